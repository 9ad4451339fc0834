"""Processes of torchrun train as one process does, in whatever way they share the work."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from full_stack_transformer.errors import UsageError
from full_stack_transformer.training import metric_names
from tests.tasks.small_tasks import TINY_ENCODER
from tests.training.data.test_rows import write_rows
from tests.training.small_conversations import write_conversations
from tests.training.together import (
    assert_same_bits,
    quiet_environment,
    torchrun,
    train_command,
    train_together,
)
from tests.training.training_here import (
    GPT2_WITH_DROPOUT,
    TrainingHere,
    checkpoint_of,
    curve_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

# Options beside those that all trainings have.
_TRAININGS: dict[str, dict[str, Any]] = {
    "documents, ddp": {"num_generated_samples": 1},
    "documents in packed rows, fsdp": {
        "strategy": "fsdp",
        "batching": "packed",
        "num_generated_samples": 1,
    },
    "conversations, ddp": {"task": "supervised_fine_tuning", "accumulate_grad_batches": 2},
    "conversations with an adapter, fsdp": {
        "task": "supervised_fine_tuning",
        "strategy": "fsdp",
        "lora_rank": 4,
        "num_generated_samples": 1,
    },
    "preferences, fsdp": {"task": "dpo", "strategy": "fsdp", "max_steps": 3},
    # Losses that look at the whole batch; the third one has a sample for one of two processes.
    "preferences by odds, ddp": {"task": "orpo", "max_steps": 3},
    "pairs of texts, fsdp": {"task": "sentence_embedding", "strategy": "fsdp", "max_steps": 4},
    "hidden tokens, fsdp": {"task": "masked_lm", "strategy": "fsdp"},
    "documents by muon, fsdp": {"strategy": "fsdp", "optimizer": "muon", "max_steps": 3},
}
# Muon orthogonalises in bf16 where the processor multiplies it, and a last digit becomes a thousandth.
_TOLERANCE = {"adamw": 1e-5, "muon": 1e-2}
_CURVES = (metric_names.TRAIN_LOSS, metric_names.VALID_LOSS, metric_names.GRADIENT_NORM)


class Together:
    """Trainings of two processes, and the options of each for other numbers of them."""

    def __init__(self, root: Path, dataset_dir: Path, model_dir: Path) -> None:
        self.root = root
        self._dataset_dir, self._model_dir = dataset_dir, model_dir
        self._datasets = {
            "supervised_fine_tuning": write_conversations(root / "talks" / "0", model_dir),
            "dpo": write_conversations(root / "choices" / "0", model_dir, kind="preferences"),
        }
        self._datasets["orpo"] = self._datasets["dpo"]
        self._pairs = write_rows(root / "pairs", "sentence_embedding", num_train=17, num_valid=9)
        self._encoder = root / "encoder.json"
        dropout = {"mlp_dropout": 0.0, "embedding_dropout": 0.0}
        self._encoder.write_text(json.dumps({**TINY_ENCODER, **dropout}))
        config = {n: 0.0 if n.endswith("_pdrop") else v for n, v in GPT2_WITH_DROPOUT.items()}
        self.config = root / "without_dropout.json"
        self.config.write_text(json.dumps(config))

    def options(self, name: str, experiment: str, num_processes: int) -> dict[str, Any]:
        """Eight samples in a batch of all processes."""
        chosen = dict(_TRAININGS[name])
        tuned = self._datasets.get(chosen.get("task", ""))
        if tuned is not None:
            chosen["model_path"] = str(self._model_dir)
        if chosen.get("task") == "sentence_embedding":
            tuned, chosen["model_config"] = self._pairs, str(self._encoder)
            chosen |= {"embedding_loss": "simcse", "vocab_size": 300, "max_length": 48}
        if num_processes == 1:
            chosen.pop("strategy", None)
        return {
            "dataset_dir": self._dataset_dir if tuned is None else tuned,
            "experiments_root": self.root,
            "experiment_name": experiment,
            "model_config": "tiny" if chosen.get("task") == "masked_lm" else str(self.config),
            "batch_size": 8 // num_processes,
            "max_epochs": -1,
            "max_steps": 6,
            "val_check_interval": 4.0,
            "num_warmup_steps": 2,
            "learning_rate": 5e-3,
            "lr_schedule": "constant",
            "accelerator": "cpu",
            "precision": "32",
            "compile": "never",
            "num_generated_samples": 0,
            "log_every_n_steps": 1,
            **chosen,
        }

    def directory(self, name: str) -> Path:
        """The experiment of the two processes."""
        return self.root / _identifier(name) / "0"

    def alone(self, name: str) -> Path:
        """The same training in this process."""
        return self.here(**self.options(name, f"{_identifier(name)}_alone", 1))

    def here(self, **options: Any) -> Path:
        """Train in this process."""
        return TrainingHere(self._dataset_dir, self.root).to_the_end(**options)


def _identifier(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


@pytest.fixture(scope="module")
def together(
    dataset_dir: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Together:
    """All trainings, by two processes."""
    found = Together(tmp_path_factory.mktemp("together"), dataset_dir, model_dir)
    done = train_together(
        [found.options(name, _identifier(name), num_processes=2) for name in _TRAININGS]
    )
    assert done.returncode == 0, done.stderr
    directories = [str(found.directory(name)) for name in _TRAININGS]
    assert done.stdout.splitlines() == directories, "one process speaks for both"
    assert done.stderr.count("serve it: fst serve") == len(_TRAININGS)
    assert "Warning" not in done.stderr
    return found


@pytest.mark.parametrize("name", _TRAININGS)
def test_two_processes_learn_what_one_learns(name: str, together: Together) -> None:
    """Within 1e-5 in fp32: the sums of a gradient have another order."""
    tolerance = _TOLERANCE[_TRAININGS[name].get("optimizer", "adamw")]
    one, two = together.alone(name), together.directory(name)
    for curve in _CURVES:
        expected, found = curve_of(one, curve), curve_of(two, curve)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in expected], abs=tolerance, rel=1e-6
        )
    tokens = [json.loads((place / "summary.json").read_text()) for place in (one, two)]
    assert tokens[0]["num_tokens"] == tokens[1]["num_tokens"]
    (weights,) = one.glob("*/*.safetensors")
    expected_weights = load_file(weights)
    found_weights = load_file(two / weights.relative_to(one))
    assert found_weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        torch.testing.assert_close(found_weights[key], value, atol=2 * tolerance, rtol=1e-3)
    for file in ("config.json", "adapter_config.json"):
        found_file = two / weights.relative_to(one).with_name(file)
        assert found_file.is_file() == weights.with_name(file).is_file()
        if found_file.is_file():
            assert found_file.read_text() == weights.with_name(file).read_text()
    if _TRAININGS[name].get("num_generated_samples"):
        written = [(one / "generated.jsonl").read_text(), (two / "generated.jsonl").read_text()]
        assert written[0] == written[1]
    assert checkpoint_of(one).keys() == checkpoint_of(two).keys(), "the same content"
    is_shared = _TRAININGS[name].get("strategy") == "fsdp"
    for checkpoint in (one / "checkpoints").iterdir():
        assert (two / "checkpoints" / checkpoint.name).is_dir() == is_shared
    assert not [*(two / "checkpoints").glob(".*")]


@pytest.mark.parametrize("name", ["documents, ddp", "documents in packed rows, fsdp"])
def test_one_process_goes_on_where_two_were(name: str, together: Together, tmp_path: Path) -> None:
    """What they have read together is not read again: --batch_size follows the number of processes."""
    whole = together.here(
        **{**together.options(name, f"{_identifier(name)}_whole", 1), "max_steps": 9}
    )
    copied = shutil.copytree(together.directory(name), tmp_path / "copied" / "0")
    options = {"resume": str(copied), "max_steps": 9, "model_config": str(together.config)}
    with pytest.raises(UsageError, match="would read 3: pass --batch_size 8, or leave it out"):
        together.here(**options, batch_size=3)
    resumed = together.here(**options)
    assert checkpoint_of(resumed)["world_size"] == 1
    assert checkpoint_of(resumed)["rows_per_batch"] == 8
    expected, found = curve_of(whole), curve_of(resumed)
    tolerance = 2 * _TOLERANCE[_TRAININGS[name].get("optimizer", "adamw")]
    assert found[-1] == pytest.approx(expected[-1], abs=tolerance)


def test_muon_that_is_dealt_out_is_that_of_one() -> None:
    """Each matrix by one process, of DDP and FSDP2; within 1e-6 in fp32."""
    done = torchrun("tests.training.muon_together")
    assert done.returncode == 0, done.stderr


def test_a_mistake_is_told_once(dataset_dir: Path, tmp_path: Path) -> None:
    done = torchrun(
        *("full_stack_transformer", "train", "--dataset_dir", dataset_dir, "--batch_size", "4"),
        *("--experiments_root", tmp_path, "--model_config", "enormous"),
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("fst: ")]
    assert len(told) == 1
    assert "--model_config must be one of" in told[0]
    assert done.returncode == 1
    assert not (tmp_path / "experiment").exists()


@pytest.mark.slow
def test_workers_of_ray_learn_what_processes_of_torchrun_learn(
    together: Together, tmp_path: Path
) -> None:
    name = "documents, ddp"
    command = train_command(together.options(name, "on_ray", 2), "--ray_address", "local")
    done = subprocess.run(
        [*command, "--ray_workers", "2"],
        env=quiet_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = together.root / "on_ray" / "0"
    assert done.stdout == f"{found}\n"
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert "serve it: fst serve" in done.stderr
    assert_same_bits(together.directory(name), found)
    for curve in _CURVES:
        assert curve_of(found, curve) == curve_of(together.directory(name), curve)
    assert "ray_" not in (found / "arguments.json").read_text().replace("on_ray", "")
    assert [path.name for path in together.root.glob(".*")] == [], "nothing of Ray is left"
    assert not (tmp_path / "ray_results").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kill", "resumed_after"),
    [
        pytest.param("documents, ddp", (1, "batch", 3), {3}, id="ddp"),
        pytest.param("documents in packed rows, fsdp", (1, "batch", 3), {2, 3}, id="fsdp"),
        # The part of one process is there, the checkpoint not yet.
        pytest.param("documents in packed rows, fsdp", (1, "save", 3), {2}, id="fsdp-saving"),
        pytest.param("documents by muon, fsdp", (0, "save", 2), {1}, id="muon-saving"),
    ],
)
def test_torchrun_goes_on_after_a_kill_to_the_same_bits(
    name: str, kill: tuple[int, str, int], resumed_after: set[int], together: Together
) -> None:
    experiment = f"killed_{_identifier(name)}_{kill[1]}"
    options = {**together.options(name, experiment, 2), "checkpoint_every_n_minutes": 0}
    done = train_together([options], kill=kill)
    assert done.returncode == 0, done.stderr
    assert any(f"resuming after step {step}" in done.stderr for step in resumed_after), done.stderr
    killed = together.root / experiment / "0"
    assert not (together.root / experiment / "1").exists()
    assert not [*(killed / "checkpoints").glob(".*")], "nothing is left of the save"
    expected, found = checkpoint_of(together.directory(name)), checkpoint_of(killed)
    for key, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][key], value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "strategy"), [(2, "ddp"), (4, "fsdp")], ids=["two, ddp", "four, fsdp"]
)
@pytest.mark.parametrize("form", ["single", "sharded"])
def test_any_number_of_processes_goes_on_with_either_form(
    form: str, num_processes: int, strategy: str, together: Together
) -> None:
    """From two processes that share weights, or one; and back to one."""
    name = "documents in packed rows, fsdp"
    started = _identifier(f"{name}_{form}_{strategy}")
    changed = {"checkpoints": form, "max_steps": 3, "val_check_interval": 3.0}
    done = train_together([{**together.options(name, started, 2), **changed}])
    assert done.returncode == 0, done.stderr
    directory = together.root / started / "0"
    assert (directory / "checkpoints" / "last.ckpt").is_dir() == (form == "sharded")
    others = {"resume": directory, "strategy": strategy, "max_steps": 5, "checkpoints": "sharded"}
    options = {**together.options(name, started, 2), **others}
    for fixed in ("batch_size", "val_check_interval"):
        del options[fixed]
    done = train_together([options], num_processes=num_processes)
    assert done.returncode == 0, done.stderr
    assert checkpoint_of(directory)["world_size"] == num_processes
    alone = {"resume": str(directory), "max_steps": 7, "model_config": str(together.config)}
    resumed = together.here(**alone)
    whole = together.here(
        **{
            **together.options(name, f"{started}_whole", 1),
            "max_steps": 7,
            "val_check_interval": 3.0,
        }
    )
    expected, found = curve_of(whole), curve_of(resumed)
    assert found[-1] == pytest.approx(expected[-1], abs=3e-5)
