"""`fst plan` as a user meets it: a measured plan, plans for GPUs, and mistakes."""

import json
import shlex
from pathlib import Path
from typing import Any

import pydantic  # noqa: F401 - where it is imported, cyclopts checks defaults, too
import pytest

from full_stack_transformer.arguments.planning import PlanArguments
from full_stack_transformer.command_line import _make_app, _normalize, run
from full_stack_transformer.planning.machines import GPUS, parse_machines
from full_stack_transformer.planning.words import count, duration, size
from tests.conftest import RunFst


def _plan(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert run(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _check_commands(commands: list[str]) -> list[str]:
    """Parsed by the real command line; their names."""
    names = []
    for line in commands:
        words = shlex.split(line)
        if words[0] == "echo":
            json.loads(words[1])
            continue
        if words[0] == "torchrun":
            words = words[words.index("full_stack_transformer") :]
            words[0] = "fst"
        assert words[0] == "fst"
        _make_app().parse_args(_normalize(words[1:]), exit_on_error=False, print_error=False)
        names.append(words[1])
    return names


def test_this_machine_is_measured_by_the_real_code(run_fst: RunFst, documents_dir: Path) -> None:
    """The documents are all there is to learn: their tokens are counted."""
    file = documents_dir / "train.txt"
    words = ("--documents_train_file", file, "--model_config", "tiny", "--vocab_size", "300")
    done = run_fst(
        "plan",
        *words,
        "--max_epochs",
        "50",
        "--max_sample_length",
        "64",
        "--seconds",
        "1",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    found, stages = plan["measurement"], plan["stages"]
    assert found["is_same_shape"]
    assert found["num_steps"] > 1
    tokens = plan["job"]["num_tokens"]
    assert tokens == pytest.approx(50 * file.stat().st_size / found["bytes_per_token"])
    steps = tokens * found["train_token"]["seconds"]
    start = found["train_start"]["seconds"]
    assert start + steps < stages["train"]["seconds"] < 2 * (start + steps) + 60
    assert 0 < stages["prepare"]["seconds"] < start
    assert stages["generate"]["seconds"] > found["generate_start"]["seconds"] > 0.5  # imports torch
    # A checkpoint and the formula.
    one = stages["checkpoints"]["disk_bytes"] / 4
    assert one == pytest.approx(found["checkpoint_bytes"], rel=0.1)
    assert stages["train"]["memory_bytes"] == found["peak_bytes"]
    assert _check_commands(plan["commands"]) == ["prepare_dataset", "train", "generate", "serve"]


@pytest.mark.parametrize(
    "tokens", [1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13], ids="{:.0e}".format
)
def test_every_size_has_a_plan_with_commands_that_exist(
    tokens: float, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(capsys, "--tokens", str(tokens), "--machines", "2x8xH100")
    if tokens > 1e6:  # else the smallest model that there is
        assert plan["job"]["tokens_per_parameter"] == pytest.approx(20, rel=0.2)
    assert plan["total"]["seconds"] > 0
    assert plan["total"]["cost"] > 0
    assert "train" in _check_commands(plan["commands"])


def test_time_and_cost_follow_from_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--tokens", "2e10", "--parameters", "1e9", "--price_per_hour", "2")
    plan = _plan(capsys, *words, "--machines", "8xH100", "--utilization", "0.5")
    rate = 8 * 989e12 * 0.5 * 0.97**3
    steps = plan["job"]["flops"] / rate * (4 / 3 if plan["job"]["activation_checkpointing"] else 1)
    seconds = plan["stages"]["train"]["seconds"]
    assert steps < seconds < 1.1 * steps + 60
    assert plan["stages"]["train"]["cost"] == pytest.approx(seconds / 3600 * 8 * 2)
    twice = _plan(capsys, *words, "--machines", "16xH100", "--utilization", "0.5")
    assert 0.5 < twice["stages"]["train"]["seconds"] / seconds < 0.56


def test_a_large_model_is_shared_or_called_impossible(capsys: pytest.CaptureFixture[str]) -> None:
    shared = _plan(capsys, "--parameters", "7e9", "--machines", "8xH100")
    assert shared["job"]["strategy"] == "fsdp"
    assert shared["training_memory"]["total"] < shared["memory_limit_bytes"]
    assert not any("impossible" in warning for warning in shared["warnings"])
    [warning, *_] = _plan(capsys, "--parameters", "7e10", "--machines", "L4")["warnings"]
    assert warning.startswith("impossible: training needs")
    assert "more devices, which share the model" in warning


def test_a_job_of_years_is_called_silly(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, "--tokens", "1e13", "--parameters", "7e9", "--machines", "H100")
    assert any(line.startswith("silly: it takes") for line in plan["warnings"])
    assert any("fst prepare_dataset --ray_address auto" in line for line in plan["not_yet"])


def test_the_page_says_what_it_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokens", "1e12", "--parameters", "7e9", "--machines", "64x8xH100"]
    assert run(["plan", *words]) == 0
    page = capsys.readouterr().out
    for part in (
        "7 B parameters on 1 T tokens",
        "over-trained",
        "None of this was measured",
        "in all",
    ):
        assert part in page
    assert "torchrun --nnodes 64 " in page
    assert "--nproc_per_node 8 -m full_stack_transformer train " in page
    assert "--strategy fsdp" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "pass --tokens, --parameters, --model_config or --dataset_dir"),
        (["--tokens", "many"], "--tokens"),
        (["--tokens", "12"], "--tokens must be between 10000 and 1e+14"),
        (["--parameters", "-1"], "--parameters must be between"),
        (["--parameters", "1e6", "--model_config", "mini"], "not both"),
        (["--tokens", "1e9", "--machines", "8xH1000"], "--machines must be this, or GPUs such as"),
        (["--tokens", "1e9", "--machines", "0xH100"], "expected 1 to 100,000 devices, found 0"),
        (["--tokens", "1e9", "--max_epochs", "1000000"], "fewer than ten samples"),
        (["--dataset_dir", "none"], "none is not a dataset directory"),
        (["--dataset_dir", "none", "--tokens", "1e9"], "omit --tokens"),
        (["--documents_train_file", "x"], "names no model; add --parameters"),
        (["--documents_train_file", "none.txt", "--parameters", "1e6"], "none.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *words]) in (1, 2)
    found = capsys.readouterr().err
    assert message in found
    assert found.count("\n") == 1


def test_machines_are_read_in_every_case() -> None:
    found = parse_machines("4x8xh100")
    assert (found.num_machines, found.devices_per_machine) == (4, 8)
    assert found.gpu is GPUS["H100"]
    assert parse_machines("rtx4090").num_devices == 1
    assert parse_machines("this").gpu is None
    assert PlanArguments(tokens=1e6).machines == "this"


def test_figures_have_two_digits() -> None:
    assert [duration(one) for one in (3.21, 59, 3000, 7300, 2e5, 4e7, 5e12)] == [
        *("3.2 s", "59 s", "50 min", "2.0 h", "2.3 days", "1.3 years", "160,000 years"),
    ]
    assert [size(one) for one in (10, 2.5e9, 6e12)] == ["10 B", "2.5 GB", "6.0 TB"]
    assert [count(one) for one in (999, 2_557_632, 1e12)] == ["999", "2.56 M", "1 T"]
