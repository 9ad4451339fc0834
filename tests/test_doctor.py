"""`fst doctor`: one page on this machine, and the same as JSON."""

import importlib.util
import json
import os
from typing import Any

import pytest

from full_stack_transformer import doctor, machine
from full_stack_transformer.arguments.training import DoctorArguments
from full_stack_transformer.modelling.backbones import DECODER_PRESETS
from tests.conftest import RunFst


@pytest.mark.parametrize("isa", ["avx2", ""], ids=["avx2", "all that there is"])
def test_it_says_what_the_machine_has_and_what_follows(isa: str, run_fst: RunFst) -> None:
    if isa and "avx2" not in machine.processor_features():
        pytest.skip("this processor has no AVX2")
    done = run_fst("doctor", "--json", "--seconds", "1", env={machine.ISA_VARIABLE: isa})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found, decisions = report["machine"], report["decisions"]
    assert found["cores"] == machine.num_cores()
    assert found["processor"] == machine.processor_name()
    has_bfloat16 = "avx512_bf16" in found["instruction_sets"]
    if isa:
        assert not has_bfloat16
    if decisions["device"] == "cpu":
        assert decisions["precision"].startswith("bf16" if has_bfloat16 else "32")
        assert ("bfloat16" if has_bfloat16 else "float32") in decisions["muon"]
        # Emulated, it is slower by far: the decision agrees with what was measured.
        gigaflops = report["speed"]["gigaflops"]
        is_hidden_from_torch = not isa and "ATEN_CPU_CAPABILITY" in os.environ
        if not is_hidden_from_torch:
            assert has_bfloat16 == (gigaflops["bfloat16"] > gigaflops["float32"])
    assert decisions["threads"].startswith("1, waiting: passive")  # OMP_NUM_THREADS of the tests
    rates = report["speed"]["training_tokens_per_second"]
    assert DECODER_PRESETS.keys() <= rates.keys()
    assert rates["mini"]["how"] == "measured"
    assert rates["base"]["how"].startswith("derived from")
    assert rates["tiny"]["tokens_per_second"] > rates["base"]["tokens_per_second"] > 0
    assert {"train", "serve", "telegram"} <= report["extras"].keys()


def test_a_wrong_variable_is_one_sentence(run_fst: RunFst) -> None:
    done = run_fst("doctor", env={machine.ISA_VARIABLE: "pentium"})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "FST_ISA must be one of" in done.stderr


def test_the_page_names_what_is_missing_and_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torch it shows the rest."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_is_installed", lambda name: name not in ("torch", "aiogram"))
    assert doctor.main(DoctorArguments()) == 0
    page = capsys.readouterr().out
    assert machine.processor_name() in page
    assert "PyTorch is not installed" in page
    lines = {line.split()[0]: line for line in page.splitlines() if line.startswith("  ")}
    assert "lacks torch: pip install" in lines["train"]
    assert "lacks aiogram: pip install" in lines["telegram"]
    assert "installed" in lines["data"]


def test_a_container_is_described_by_what_it_may_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cores_of_quota", lambda: 0.5)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert doctor.main(DoctorArguments(json=True, seconds=0)) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["machine"]["cores"] == 1
    assert report["machine"]["cores_of_the_machine"] == 64
    assert report["speed"] == {}


def test_it_measures_nothing_where_memory_is_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the system would kill it in the middle of a page."""
    monkeypatch.setattr(machine, "_available_bytes", lambda: 90_000_000)
    assert doctor.main(DoctorArguments(seconds=1)) == 0
    page = capsys.readouterr().out
    assert "Speed was not measured: it takes 600 MB of memory, 90 MB are free" in page
    assert "Extras" in page
