"""What the machine has, and hiding a part of it."""

import os
from pathlib import Path

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


@pytest.mark.parametrize("isa", machine.instruction_sets())
def test_each_instruction_set_of_this_machine_can_be_had(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = machine.instruction_sets()
    monkeypatch.setenv(machine.ISA_VARIABLE, isa)
    assert machine.instruction_sets()[0] == isa
    assert set(machine.instruction_sets()) <= set(sets)
    if library.why_not() is None:
        assert library.load_library().isa == isa


def test_the_features_of_other_processors_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, best in [
        ("processor : 0\nFeatures\t: fp asimd asimdhp asimddp sve\n", "neon"),
        ("processor : 0\nFeatures\t: fp asimd\n", "plain"),
        ("flags\t\t: fpu avx avx2 fma\nbugs : x\n", "avx2"),
        ("flags\t\t: fpu avx2 fma avx_vnni\n", "avx_vnni"),
        ("flags\t\t: avx2 fma avx512f avx512bw avx512vl\n", "avx512"),
        ("flags\t\t: avx2 fma avx512f avx512cd\n", "avx2"),
    ]:
        monkeypatch.delenv(machine.ISA_VARIABLE, raising=False)
        monkeypatch.setattr(
            machine._CPUINFO.__class__, "read_text", lambda *_, text=text, **__: text
        )
        machine._features_of_processor.cache_clear()
        try:
            assert machine.instruction_sets()[0] == best
        finally:
            monkeypatch.undo()
            machine._features_of_processor.cache_clear()


@pytest.mark.parametrize("isa", ["sse", "AVX2", "avx512 "])
def test_an_unknown_instruction_set_is_a_mistake(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.ISA_VARIABLE, isa)
    with pytest.raises(MachineError, match=r"FST_ISA must be one of avx512_bf16, .*, plain; found"):
        machine.processor_features()


def test_an_instruction_set_that_is_not_there_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(machine.ISA_VARIABLE, "avx512")
    monkeypatch.setattr(machine, "_features_of_processor", lambda: frozenset({"avx2", "fma"}))
    message = (
        "FST_ISA=avx512: this processor lacks avx512bw, avx512f, avx512vl; .* one of avx2, plain"
    )
    with pytest.raises(MachineError, match=message):
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


_TWO_GIGABYTES = str(2 * 2**30)
_GROUPS_OF_A_SERVICE = {
    "second version, in a container": (
        "0::/\n",
        {
            "cpu.max": "150000 100000",
            "memory.max": _TWO_GIGABYTES,
            "memory.current": "1000000",
            "memory.stat": "anon 5\ninactive_file 400000\n",
        },
    ),
    "second version, a limit of the group around": (
        "0::/user.slice/job\n",
        {
            "cpu.max": "max 100000",
            "memory.max": "max",
            "user.slice/cpu.max": "200000 100000",
            "user.slice/memory.max": _TWO_GIGABYTES,
            "user.slice/memory.current": "1000000",
            "user.slice/memory.stat": "inactive_file 400000\n",
            "user.slice/job/cpu.max": "max 100000",
            "user.slice/job/memory.max": "max",
        },
    ),
    "first version": (
        "5:memory:/a/b\n4:cpu,cpuacct:/a/b\n1:name=systemd:/a\n",
        {
            "cpu,cpuacct/a/b/cpu.cfs_quota_us": "120000",
            "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/a/memory.limit_in_bytes": _TWO_GIGABYTES,
            "memory/a/memory.usage_in_bytes": "1000000",
            "memory/a/memory.stat": "inactive_file 400000\n",
        },
    ),
    "first version, the path is that of the host": (
        "5:memory:/docker/abc\n4:cpu:/docker/abc\n0::/docker/abc\n",
        {
            "cpu/cpu.cfs_quota_us": "200000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": _TWO_GIGABYTES,
            "memory/memory.usage_in_bytes": "1000000",
            "memory/memory.stat": "inactive_file 400000\n",
        },
    ),
}


def _lay_out_groups(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, files = _GROUPS_OF_A_SERVICE[name]
    (root / "own").write_text(own)
    for path, content in files.items():
        (root / "groups" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "groups" / path).write_text(content)
    monkeypatch.setattr(machine, "_OWN_GROUPS", root / "own")
    monkeypatch.setattr(machine, "_GROUPS", root / "groups")


@pytest.mark.parametrize("name", _GROUPS_OF_A_SERVICE)
def test_a_container_limits_cores_and_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lay_out_groups(name, tmp_path, monkeypatch)
    monkeypatch.setattr(machine, "_bound_cores", lambda: 64)
    assert machine.num_cores() == 2
    free = machine.free_memory_bytes(torch.device("cpu"))
    assert free is not None
    assert free <= int(_TWO_GIGABYTES) - 600_000
    monkeypatch.setattr(machine, "_available_bytes", lambda: None)
    assert machine.free_memory_bytes(torch.device("cpu")) == int(_TWO_GIGABYTES) - 600_000


def test_without_control_groups_the_bound_cores_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(machine, "_bound_cores", lambda: 3)
    assert machine.num_cores() == 3


def test_threads_wait_asleep_and_keep_to_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", machine.ISA_VARIABLE):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    _lay_out_groups("first version", tmp_path, monkeypatch)
    monkeypatch.setattr(machine, "_bound_cores", lambda: 2)
    machine.prepare_libraries()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setattr(machine, "_bound_cores", lambda: 64)
    machine.prepare_libraries()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    machine.prepare_libraries()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"]) == ("ACTIVE", "7")


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
