"""This computer: processor features, cores, memory, devices. The only module that asks the system for them.

`FST_ISA=avx2` hides AVX-512, so that everything runs as on a processor without it; likewise for the other
instruction sets of `INSTRUCTION_SETS`. Standard library only; torch is imported only for questions about a
device. Knows nothing of models.
"""

import contextlib
import errno
import itertools
import math
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from full_stack_transformer.errors import MachineError

if TYPE_CHECKING:
    import torch

ISA_VARIABLE = "FST_ISA"
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "fma"})
# Instruction sets that the C++ decoder is written for, best first -> the processor features that they need.
INSTRUCTION_SETS = {
    "avx512_bf16": _AVX512 | {"avx512_vnni", "avx512_bf16"},
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "avx512": _AVX512,
    "avx_vnni": frozenset({"avx2", "fma", "avx_vnni"}),
    "avx2": frozenset({"avx2", "fma"}),
    "neon": frozenset({"asimddp"}),
    "plain": frozenset(),
}
# Value of the variable -> prefixes of the processor features that it hides.
_HIDDEN_FEATURES: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (),
    "avx512_vnni": ("avx512_bf16", "avx512_fp16", "amx"),
    "avx512": ("avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx"),
    "avx_vnni": ("avx512", "amx"),
    "avx2": ("avx512", "avx_vnni", "amx"),
    "neon": (),
    "plain": ("avx", "amx", "fma", "asimddp"),
}
# And what hides them from torch and oneDNN.
_LIBRARIES_OF_ISA = {
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx_vnni": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
# Linux's control groups, by which containers, systemd and Slurm limit a process; in one of two versions, or
# both. A group lies in groups that have limits of their own.
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# Limit and use of memory.
_MEMORY_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)

# Sides of the square matrices that are tried. On two cores of an EPYC (Zen 4) bf16 is fastest at 512 and
# 1536 (420 GFLOP/s; 365 at 2048, where the second-level cache no longer helps); a GPU needs large ones.
_SIDES_ON_CPU = (512, 1024, 1536)
_SIDES_ON_ACCELERATOR = (4096, 8192)
_SECONDS_PER_SIDE = 0.12
# Larger than any cache, as far as there is memory.
_COPIED_BYTES = 2**28

# glibc returns large blocks to the system when they are freed and requests them again, zeroed, in the next
# training step. With freed memory kept, training on a processor is 1.1 to 1.5 times as fast (a model of
# 4 x 256, batches of 16 x 256, two cores: 4,100-7,000 tokens/s without, 7,300-8,250 with).
ALLOCATOR_VARIABLE = "GLIBC_TUNABLES"
ALLOCATOR_SETTINGS = ":".join(
    (
        "glibc.malloc.mmap_max=0",  # take large blocks from the heap, which reuses them
        "glibc.malloc.trim_threshold=17179869184",  # bytes kept at the end of the heap
        "glibc.malloc.top_pad=67108864",  # bytes requested at once
        "glibc.malloc.hugetlb=1",  # transparent huge pages
    )
)


def processor_features() -> frozenset[str]:
    """Instruction sets by Linux's names, such as avx512_bf16, without those that FST_ISA hides.

    Empty if the system does not list them.

    Raises:
        MachineError: FST_ISA is invalid, or requires more than the processor has.
    """
    features = _features_of_processor()
    isa = os.environ.get(ISA_VARIABLE)
    if not isa:
        return features
    if isa not in INSTRUCTION_SETS:
        raise MachineError(
            f"{ISA_VARIABLE} must be one of {', '.join(INSTRUCTION_SETS)}; found {isa!r}"
        )
    missing = INSTRUCTION_SETS[isa] - features
    if missing:
        raise MachineError(
            f"{ISA_VARIABLE}={isa}: this processor lacks {', '.join(sorted(missing))}; unset it, or choose "
            f"one of {', '.join(_runnable(features))}"
        )
    hidden = _HIDDEN_FEATURES[isa]
    return frozenset(name for name in features if not name.startswith(hidden))


def instruction_sets() -> tuple[str, ...]:
    """Those of `INSTRUCTION_SETS` that this process may use, best first.

    Raises:
        MachineError: FST_ISA is invalid, or requires more than the processor has.
    """
    return _runnable(processor_features())


def _runnable(features: frozenset[str]) -> tuple[str, ...]:
    return tuple(name for name, needed in INSTRUCTION_SETS.items() if needed <= features)


@cache
def _features_of_processor() -> frozenset[str]:
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset({"asimd", "asimddp"})  # every processor of Apple's for Macs
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    # "flags" on x86, "Features" on ARM.
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def processor_name() -> str:
    """As the system calls it; the architecture if it does not."""
    with contextlib.suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use at once: bound to it, and within the quota of a container."""
    quota = _cores_of_quota()
    return _bound_cores() if quota is None else max(1, min(_bound_cores(), math.ceil(quota)))


def _bound_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cores_of_quota() -> float | None:
    """Processor time per time that the control groups allow; None without a limit."""
    quotas = []
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
            quotas.append(int(quota) / int(period))
    return min((quota for quota in quotas if quota > 0), default=None)  # -1: no limit


def _groups(controller: str) -> Iterator[Path]:
    """The directories of the control group of this process and of those around it.

    A container sees its own group as the root, though its path may be that of the host.
    """
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        # The second version has the number 0 and no names. Beside the first it is mounted elsewhere.
        if number == "0":
            roots = [_GROUPS, _GROUPS / "unified"]
        elif controller in names.split(","):
            roots = [_GROUPS / names, _GROUPS / controller]
        else:
            continue
        for root in roots:
            inside = Path(path.lstrip("/"))
            yield from (root / part for part in (inside, *inside.parents))


def prepare_libraries() -> None:
    """Tell the libraries that compute what they do not find out: before torch is imported.

    FST_ISA hides the newer instructions from torch and oneDNN too, or nothing would be as on a lesser
    processor.

    OpenMP's threads spin while they wait for each other; where other processes want the cores, each waits
    for a time slice of the other. Training the preset mini on two cores of an EPYC
    (Zen 4) without AVX-512, tokens/s and processor seconds a step, with other load of 5 and of 10:

        one thread                     2,202  0.54       700  0.60
        two that spin, as by default     361  2.96       115  4.05
        two that sleep (passive)       1,674  0.58     1,519  0.56

    A quota of processor time is unknown to OpenMP: it would start a thread for each core of the host. What
    the user has set stays.
    """
    for name, value in _LIBRARIES_OF_ISA.get(os.environ.get(ISA_VARIABLE, ""), {}).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if num_cores() < _bound_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(num_cores()))


def multiplies_bfloat16(device: "torch.device") -> bool:
    """Whether the hardware multiplies bfloat16; emulated, it is some 20 times slower than float32."""
    if device.type == "cuda":
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and "avx512_bf16" in processor_features()


def measure_matmul_peak(device: "torch.device", dtype: "torch.dtype") -> float:
    """FLOP/s of the fastest square matrix product on `device`: under half a second on two cores.

    The best of many repetitions, since other load can only slow one down. A type that is emulated is tried
    with the smallest matrices alone.
    """
    sides = _SIDES_ON_CPU if device.type == "cpu" else _SIDES_ON_ACCELERATOR
    best = 0.0
    for side in sides:
        if best and 2 * side**3 / best > 2 * _SECONDS_PER_SIDE:
            break
        best = max(best, _measure_matmul(side, device, dtype))
    return best


def _measure_matmul(side: int, device: "torch.device", dtype: "torch.dtype") -> float:
    import torch

    generator = torch.Generator(device).manual_seed(0)  # the training's own is left alone
    left, right = (
        torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2)
    )
    out = left @ right  # selects the kernel, and allocates
    wait_for(device)
    best, deadline = float("inf"), time.perf_counter() + _SECONDS_PER_SIDE
    while (started := time.perf_counter()) < deadline:
        torch.mm(left, right, out=out)
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best if best < float("inf") else 0.0


def measure_bandwidth(device: "torch.device") -> float:
    """Bytes per second, read and written, of a copy that fits in no cache; the best of several."""
    import torch

    num_bytes = min(_COPIED_BYTES, (free_memory_bytes(device) or _COPIED_BYTES) // 8)
    source = torch.ones(max(1, num_bytes // 4), device=device)
    target = torch.zeros_like(source)
    best, deadline = float("inf"), time.perf_counter() + 4 * _SECONDS_PER_SIDE
    while (started := time.perf_counter()) < deadline:
        target.copy_(source)
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def wait_for(device: "torch.device") -> None:
    """Wait until a device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def free_memory_bytes(device: "torch.device") -> int | None:
    """Memory that can still be allocated on the device without swapping; None if unknown.

    On the processor also bounded by `ulimit -v` and by the memory of a container.
    """
    if device.type == "cuda":
        return _free_bytes_of_gpu(device)
    bounds = (_available_bytes(), _bytes_under_address_limit(), _bytes_under_group_limit())
    return min((one for one in bounds if one is not None), default=None)


def free_page_bytes() -> int | None:
    """Memory that this process can still write to where it has reserved addresses; None if unknown."""
    bounds = (_available_bytes(), _bytes_under_group_limit())
    return min((one for one in bounds if one is not None), default=None)


def check_free_memory(num_bytes: int, what: str, device: "torch.device") -> None:
    """Refuse what cannot fit: where memory is lent freely, the system would kill the process in the middle.

    Args:
        num_bytes: the least that it needs.
        what: that needs it, for the message.
        device: where.

    Raises:
        MachineError: less is free.
    """
    free = free_memory_bytes(device)
    if free is not None and num_bytes > free:
        raise MachineError(
            f"memory is short for {what}: at least {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; "
            "free some, raise the limit (ulimit -v, the container's) or choose a smaller model"
        )


def total_memory_bytes() -> int | None:
    """Memory that the machine has, or that the control groups allow; None if unknown."""
    bounds = [_memory_of_machine("MemTotal")]
    for group, (limit, _) in itertools.product(_groups("memory"), _MEMORY_FILES):
        with contextlib.suppress(OSError, ValueError):
            bounds.append(int((group / limit).read_text()))
    return min((one for one in bounds if one is not None), default=None)


def _free_bytes_of_gpu(device: "torch.device") -> int:
    """What the driver has, and what torch keeps of it for its next allocations; within torch's own limit."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - allocated
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return max(0, min(free + kept, limit - allocated))


def _available_bytes() -> int | None:
    return _memory_of_machine("MemAvailable")


def _memory_of_machine(name: str) -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def _bytes_under_address_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        used = int(_STATM.read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None
    return max(0, limit - used)


def _bytes_under_group_limit() -> int | None:
    bounds = []
    for group, (limit, used) in itertools.product(_groups("memory"), _MEMORY_FILES):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            # Pages of files count as used, though they are given up when memory is short.
            files = sum(
                int(line.split()[1])
                for line in (group / "memory.stat").read_text().splitlines()
                if line.startswith("inactive_file ")
            )
            free = int((group / limit).read_text()) - int((group / used).read_text()) + files
            bounds.append(max(0, free))
    return min(bounds, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python and PyTorch, on processors and devices, say so in several ways."""
    text = str(error).lower()
    words = (
        "alloc_failed",  # cuBLAS and cuDNN
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "out of memory",
    )
    return isinstance(error, MemoryError) or any(one in text for one in words)


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Inside, an allocation that fails is an error in words.

    Raises:
        MachineError: memory is short.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            f"{memory_is_short_for(what, error)} or choose a smaller model"
        ) from error


def memory_is_short_for(what: str, error: BaseException) -> str:
    """A sentence to go on with: whose memory is short, and how there may be more of it."""
    words = str(error).lower()
    if "cuda" in words or "hip out of" in words or "alloc_failed" in words:
        return f"the GPU's memory is short for {what}; free some (nvidia-smi shows what uses it)"
    return f"memory is short for {what}; free some, raise the limit (ulimit -v, the container's)"


def resident_bytes() -> int | None:
    """Memory of this process in RAM; None if unknown."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError):
        return None


def peak_resident_bytes() -> int:
    """The most memory that this process has had in RAM."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def listen(host: str, port: int, flag: str = "--port", *, shares: bool = False) -> socket.socket:
    """A socket that listens; `port` 0 is any free one.

    Args:
        host: address.
        port: number.
        flag: that names the port, for errors.
        shares: whether other processes of this user, which share it too, may have the same port.

    Raises:
        MachineError: the port is in use or forbidden, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shares:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        is_taken = error.errno == errno.EADDRINUSE
        advice = (
            f"stop what uses it, or pass {flag}" if is_taken else f"check the address and {flag}"
        )
        raise MachineError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; {advice}"
        ) from error
    return listener


def restart_with_kept_memory(argv: list[str]) -> None:
    """Restart `fst ARGV` with an allocator that keeps freed memory; without glibc do nothing.

    The settings can only be passed in the environment of a new process.
    """
    if ALLOCATOR_VARIABLE in os.environ or platform.libc_ver()[0] != "glibc":
        return
    environment = {**os.environ, ALLOCATOR_VARIABLE: ALLOCATOR_SETTINGS}
    command = [sys.executable, "-m", "full_stack_transformer", *argv]
    os.execve(sys.executable, command, environment)  # noqa: S606 (no shell, our own arguments)
