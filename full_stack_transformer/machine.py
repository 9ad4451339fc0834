"""This computer: processor features, cores, memory, devices. The only module that asks the system for them.

`FST_ISA=avx2` hides AVX-512, so that everything runs as on a processor without it. Standard library only;
torch is imported only for questions about a device. Knows nothing of models.
"""

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from full_stack_transformer.errors import MachineError

if TYPE_CHECKING:
    import torch

ISA_VARIABLE = "FST_ISA"
# Value of the variable -> prefixes of the processor features that it hides.
_HIDDEN_FEATURES = {"avx512": (), "avx2": ("avx512", "amx")}
_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
# Limit and use of a container's memory, by the two versions of Linux's control groups.
_GROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)

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
    if isa not in _HIDDEN_FEATURES:
        raise MachineError(
            f"{ISA_VARIABLE} must be one of {', '.join(_HIDDEN_FEATURES)}; found {isa!r}"
        )
    if isa == "avx512" and "avx512f" not in features:
        raise MachineError(f"{ISA_VARIABLE}=avx512: this processor has no AVX-512; unset it")
    hidden = _HIDDEN_FEATURES[isa]
    return frozenset(name for name in features if not (hidden and name.startswith(hidden)))


@cache
def _features_of_processor() -> frozenset[str]:
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def multiplies_bfloat16(device: "torch.device") -> bool:
    """Whether the hardware multiplies bfloat16; emulated, it is some 20 times slower than float32."""
    if device.type == "cuda":
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and "avx512_bf16" in processor_features()


def free_memory_bytes(device: "torch.device") -> int | None:
    """Memory that can still be allocated on the device without swapping; None if unknown.

    On the processor also bounded by `ulimit -v` and by the memory of a container.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    bounds = (_available_bytes(), _bytes_under_address_limit(), _bytes_under_group_limit())
    return min((one for one in bounds if one is not None), default=None)


def _available_bytes() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(available[0]) * 1024 if available else None


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
    for limit, used in _GROUP_LIMITS:
        try:
            # Pages of files count as used, though they are given up when memory is short.
            files = sum(
                int(line.split()[1])
                for line in used.with_name("memory.stat").read_text().splitlines()
                if line.startswith("inactive_file ")
            )
            return max(0, int(limit.read_text()) - int(used.read_text()) + files)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python and PyTorch, on processors and devices, say so in several ways."""
    text = str(error).lower()
    words = (
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
            f"memory is short for {what}; free some, raise the limit (ulimit -v, the container's) or "
            "choose a smaller model"
        ) from error


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


def restart_with_kept_memory(argv: list[str]) -> None:
    """Restart `fst ARGV` with an allocator that keeps freed memory; without glibc do nothing.

    The settings can only be passed in the environment of a new process.
    """
    if ALLOCATOR_VARIABLE in os.environ or platform.libc_ver()[0] != "glibc":
        return
    environment = {**os.environ, ALLOCATOR_VARIABLE: ALLOCATOR_SETTINGS}
    command = [sys.executable, "-m", "full_stack_transformer", *argv]
    os.execve(sys.executable, command, environment)  # noqa: S606 (no shell, our own arguments)
