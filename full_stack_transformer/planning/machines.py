"""The machines of a plan: published figures of GPUs, and what `--machines 4x8xH100` means.

Knows nothing of models.
"""

import re
from dataclasses import dataclass

from full_stack_transformer.errors import UsageError

_MACHINES = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z][\w-]*)", re.IGNORECASE)
_MOST_DEVICES = 100_000


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a vendor publishes of one device, and a price that is an assumption."""

    name: str
    flops: float
    """Peak FLOP/s of dense matrix products in bfloat16, without sparsity."""
    memory_bytes: float
    bytes_per_second: float
    """Bandwidth of its memory."""
    price_per_hour: float
    """Assumed, in US dollars: the middle of what clouds asked on demand in 2025, from half to twice of it."""


# Data sheets of NVIDIA and AMD: A100 80GB SXM, H100 SXM, H200 SXM, B200 (one of HGX B200), L40S, L4,
# GeForce RTX 4090 (Ada architecture whitepaper, fp32 accumulation), MI300X. Where a sheet gives FLOP/s "with
# sparsity", half of it stands here.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="A100",
            flops=312e12,
            memory_bytes=80e9,
            bytes_per_second=2.04e12,
            price_per_hour=1.8,
        ),
        Gpu(
            name="H100",
            flops=989e12,
            memory_bytes=80e9,
            bytes_per_second=3.35e12,
            price_per_hour=3.0,
        ),
        Gpu(
            name="H200",
            flops=989e12,
            memory_bytes=141e9,
            bytes_per_second=4.8e12,
            price_per_hour=3.5,
        ),
        Gpu(
            name="B200",
            flops=2250e12,
            memory_bytes=180e9,
            bytes_per_second=7.7e12,
            price_per_hour=6.0,
        ),
        Gpu(
            name="L40S",
            flops=362e12,
            memory_bytes=48e9,
            bytes_per_second=0.864e12,
            price_per_hour=1.0,
        ),
        Gpu(
            name="L4", flops=121e12, memory_bytes=24e9, bytes_per_second=0.3e12, price_per_hour=0.7
        ),
        Gpu(
            name="RTX4090",
            flops=165e12,
            memory_bytes=24e9,
            bytes_per_second=1.01e12,
            price_per_hour=0.5,
        ),
        Gpu(
            name="MI300X",
            flops=1307e12,
            memory_bytes=192e9,
            bytes_per_second=5.3e12,
            price_per_hour=3.0,
        ),
    )
}


@dataclass(frozen=True)
class Machines:
    """Equal machines with equal GPUs, or with None this machine."""

    num_machines: int
    devices_per_machine: int
    gpu: Gpu | None

    @property
    def num_devices(self) -> int:
        """Of all machines."""
        return self.num_machines * self.devices_per_machine

    @property
    def words(self) -> str:
        """As a reader calls them."""
        if self.gpu is None:
            return "this machine"
        if self.num_machines == 1:
            return f"{self.devices_per_machine} x {self.gpu.name}"
        return (
            f"{self.num_machines} machines with {self.devices_per_machine} x {self.gpu.name} each"
        )


def parse_machines(text: str) -> Machines:
    """What --machines names.

    Raises:
        UsageError: it is not `this`, and no known GPU with numbers before it.
    """
    if text.strip().lower() == "this":
        return Machines(1, 1, None)
    found = _MACHINES.fullmatch(text.replace(" ", ""))
    gpus = {name.lower(): gpu for name, gpu in GPUS.items()}
    gpu = gpus.get(found[3].lower()) if found else None
    if found is None or gpu is None:
        raise UsageError(
            f"--machines must be this, or GPUs such as 8xH100 or 4x8xH100 (machines x devices x name), of "
            f"{', '.join(GPUS)}; found {text!r}"
        )
    first, second = (int(number) if number else 1 for number in found.group(1, 2))
    num_machines, num_devices = (first, second) if found[2] else (1, first)
    if not 1 <= num_machines * num_devices <= _MOST_DEVICES:
        raise UsageError(
            f"--machines {text}: expected 1 to {_MOST_DEVICES:,} devices, found "
            f"{num_machines * num_devices:,}"
        )
    return Machines(num_machines, num_devices, gpu)
