"""What the machine has, and hiding a part of it."""

import os

import pytest
import torch

from full_stack_transformer import machine
from full_stack_transformer.errors import MachineError
from full_stack_transformer.generation.runners.native import library


def test_avx2_hides_what_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.ISA_VARIABLE, raising=False)
    everything = machine.processor_features()
    monkeypatch.setenv(machine.ISA_VARIABLE, "avx2")
    rest = machine.processor_features()
    assert rest <= everything
    assert not any(name.startswith(("avx512", "amx")) for name in rest)
    assert ("avx2" in rest) == ("avx2" in everything)
    assert not machine.multiplies_bfloat16(torch.device("cpu"))
    assert library.why_not() is not None


@pytest.mark.parametrize("isa", ["sse", "AVX2", "avx512 "])
def test_an_unknown_instruction_set_is_a_mistake(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.ISA_VARIABLE, isa)
    with pytest.raises(MachineError, match=r"FST_ISA must be one of avx512, avx2; found"):
        machine.processor_features()


def test_an_instruction_set_that_is_not_there_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(machine.ISA_VARIABLE, "avx512")
    monkeypatch.setattr(machine, "_features_of_processor", lambda: frozenset({"avx2"}))
    with pytest.raises(MachineError, match="has no AVX-512"):
        machine.processor_features()


def test_cores_are_those_that_the_process_may_use() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not bind processes to cores")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert machine.num_cores() == len(allowed)


def test_resident_memory_follows_what_is_allocated() -> None:
    before = machine.resident_bytes()
    assert before is not None
    held = torch.ones(20_000_000)
    after = machine.resident_bytes()
    assert after is not None
    assert 0.9 * held.nbytes < after - before < 1.5 * held.nbytes
    assert machine.peak_resident_bytes() > held.nbytes


def test_free_memory_is_less_than_there_is() -> None:
    free = machine.free_memory_bytes(torch.device("cpu"))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free is not None
    assert 0 < free < total
