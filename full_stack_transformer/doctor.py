"""`fst doctor`: this machine on one page, what follows from it, how fast it is, and what is missing.

fst doctor --json --seconds 5

What follows is asked where it is decided, so that the page cannot differ from what commands do. Without
torch it shows the rest. Changes nothing.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from full_stack_transformer import __version__, machine
from full_stack_transformer.arguments.training import DoctorArguments
from full_stack_transformer.errors import install_command

if TYPE_CHECKING:
    import torch

# Of the instruction sets those that arithmetic here depends on, by Linux's names.
_SHOWN_FEATURES = re.compile(
    r"avx2|fma|f16c|avx_vnni|avx512(f|_vnni|_bf16|_fp16)|amx_\w+|asimd(dp|hp)?|i8mm|bf16|sve2?"
)
_COMPILERS = ("g++", "clang++", "c++")
_PURPOSES = {
    "data": "faster encoding, .parquet and .zst files",
    "evaluation": "metrics of labelled rows and generated texts",
    "train": "fst train, fst evaluate, fst generate",
    "serve": "fst serve",
    "constraints": "answers that follow a JSON schema",
    "telegram": "fst telegram_bot",
    "harness": "fst evaluate --harness",
}
_PACKAGE = "full_stack_transformer"
# What is trained: the demo's batches of a vocabulary of its size.
_VOCABULARY, _ROWS, _TOKENS = 4096, 8, 256
# What measuring takes at most, beside the libraries: 0.55 GB in fp32.
_MEASURING_BYTES = 600e6
# In this order as far as time allows; the demo asks for the first one.
_MEASURED_CONFIGS = ("mini", "micro", "tiny", "small")
_BYTES_PER_GIGABYTE = 1e9


def main(arguments: DoctorArguments) -> int:
    """Print the page, or JSON; always 0."""
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    report: dict[str, Any] = {"machine": _machine(has_torch=has_torch)}
    report["decisions"] = _decisions() if has_torch else {}
    report["speed"] = _speed(arguments.seconds) if has_torch and arguments.seconds else {}
    report["extras"] = _extras()
    text = json.dumps(report, indent=2) if arguments.json else "\n".join(_page(report))
    sys.stdout.write(f"{text}\n")
    return 0


def _machine(*, has_torch: bool) -> dict[str, Any]:
    versions = {"full_stack_transformer": __version__, "python": platform.python_version()}
    if has_torch:
        versions["torch"] = importlib.metadata.version("torch")
    return {
        "processor": machine.processor_name(),
        "system": f"{platform.system()} on {platform.machine()}",
        "instruction_sets": sorted(filter(_SHOWN_FEATURES.fullmatch, machine.processor_features())),
        "hidden_by_fst_isa": os.environ.get(machine.ISA_VARIABLE),
        "cores": machine.num_cores(),
        "cores_of_the_machine": os.cpu_count(),
        "memory_bytes": machine.total_memory_bytes(),
        "compiler": next(filter(None, map(shutil.which, _COMPILERS)), None),
        "devices": [*_devices()] if has_torch else [],
        "versions": versions,
    }


def _devices() -> Iterator[dict[str, Any]]:
    import torch

    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        yield {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiplies_bfloat16": machine.multiplies_bfloat16(device),
        }
    if torch.backends.mps.is_available():
        yield {"name": "Apple GPU (mps)", "memory_bytes": None, "multiplies_bfloat16": False}


def _device() -> "torch.device":
    """Where training runs by default."""
    import torch

    from full_stack_transformer.modelling.model_directory import resolve_device

    return torch.device(resolve_device("auto").type)


def _decisions() -> dict[str, str]:
    """What `auto` means here, and why."""
    import torch

    from full_stack_transformer.generation.runners.native import library

    device = _device()
    has_bfloat16 = machine.multiplies_bfloat16(device)
    on_processor = device.type == "cpu"
    why = f"{'it multiplies' if has_bfloat16 else 'it does not multiply'} bfloat16 in hardware"
    waiting = os.environ.get("OMP_WAIT_POLICY", "as OpenMP likes").lower()
    why_no_decoder = library.why_not()
    if why_no_decoder is None:
        decoder = f"the built-in C++ decoder for {library.load_library().isa}"
    else:
        decoder = f"PyTorch, since the C++ decoder is not available: {why_no_decoder}"
    weights = "bfloat16" if machine.multiplies_bfloat16(torch.device("cpu")) else "float32"
    return {
        "device": str(device),
        "precision": f"{'bf16' if has_bfloat16 else '32'}, since {why}",
        "muon": f"orthogonalises in {'bfloat16' if has_bfloat16 else 'float32'}",
        "attention": "written out for bf16, torch's kernel for fp32" if on_processor else "torch's",
        "threads": f"{torch.get_num_threads()}, waiting: {waiting}",
        "compile": "for long trainings" if _has_compiler(device) else "not possible without g++",
        "generation": decoder
        if on_processor
        else f"PyTorch on {device}; on the processor {decoder}",
        "weights_dtype": f"{weights} on the processor",
    }


def _has_compiler(device: "torch.device") -> bool:
    return device.type != "cpu" or any(map(shutil.which, _COMPILERS))


def _speed(seconds: float) -> dict[str, Any]:
    """Measured on the default device, in about `seconds` after the imports; or why it was not."""
    import torch

    for name in ("modelling.backbones", "training.optimization"):
        importlib.import_module(f"{_PACKAGE}.{name}")
    device = _device()
    free = machine.free_memory_bytes(torch.device("cpu"))
    if free is not None and free < _MEASURING_BYTES:
        why = f"it takes {_MEASURING_BYTES / 1e6:,.0f} MB of memory, {free / 1e6:,.0f} MB are free"
        return {"not_measured": why}
    deadline = time.perf_counter() + seconds
    types = (torch.float32, torch.bfloat16)
    gigaflops = {
        str(dtype).removeprefix("torch."): round(machine.measure_matmul_peak(device, dtype) / 1e9)
        for dtype in types
    }
    bandwidth = machine.measure_bandwidth(device) / _BYTES_PER_GIGABYTE
    return {
        "device": str(device),
        "gigaflops": gigaflops,
        "memory_gigabytes_per_second": round(bandwidth, 1),
        "training_tokens_per_second": _training_rates(device, deadline),
    }


def _training_rates(device: "torch.device", deadline: float) -> dict[str, dict[str, Any]]:
    """Of each preset: measured in the order of `_MEASURED_CONFIGS` while there is time, or derived.

    A rate is derived by the floating point operations of a token from that of the measured preset that is
    most alike.
    """
    from full_stack_transformer.modelling.acceleration import flops_per_token
    from full_stack_transformer.modelling.backbones import DECODER_PRESETS, GPT2_PRESET

    names = (*DECODER_PRESETS, GPT2_PRESET)
    flops: dict[str, float] = {}
    measured: dict[str, float] = {}
    for name in sorted(names, key=lambda name: (*_MEASURED_CONFIGS, *names).index(name)):
        flops[name] = flops_per_token(_new_backbone(name, "meta"), _TOKENS)
        seconds_left = deadline - time.perf_counter()
        seconds_of_step = 0.0
        for known, rate in measured.items():
            seconds_of_step = _ROWS * _TOKENS / rate * flops[name] / flops[known]
        if name == _MEASURED_CONFIGS[0] or (
            name in _MEASURED_CONFIGS and 2 * seconds_of_step < seconds_left
        ):
            step = _training_step(_new_backbone(name, device), device)
            measured[name] = _measure_training(step, device, seconds_left / 2)
    rates: dict[str, dict[str, Any]] = {}
    for name in names:
        known = min(measured, key=lambda other: abs(math.log(flops[other] / flops[name])))
        rate = measured[known] * flops[known] / flops[name]
        how = "measured" if name == known else f"derived from {known}"
        rates[name] = {"tokens_per_second": round(rate), "how": how}
    return rates


def _new_backbone(name: str, device: "torch.device | str") -> Any:
    import torch

    from full_stack_transformer.modelling.backbones import new_backbone

    with torch.device(device):
        return new_backbone(
            name,
            vocab_size=_VOCABULARY,
            max_length=_TOKENS,
            special_token_ids={"begin": 0, "end": 1, "pad": 2},
        )


def _training_step(backbone: Any, device: "torch.device") -> Callable[[], None]:
    """A step of the demo's training: forward, backward, Muon."""
    import torch

    from full_stack_transformer.modelling.acceleration import accelerate
    from full_stack_transformer.modelling.losses import next_token_loss
    from full_stack_transformer.training.optimization import make_optimizer

    accelerate(backbone)
    backbone.train()
    optimizer = make_optimizer(backbone, name="muon", learning_rate=1e-3, weight_decay=0.1)
    has_bfloat16 = machine.multiplies_bfloat16(device)
    ids = torch.randint(3, _VOCABULARY, (_ROWS, _TOKENS), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16):
            logits = backbone(input_ids=ids, use_cache=False).logits
            loss, count = next_token_loss(logits, ids)
        torch.autograd.backward(loss / count)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _measure_training(step: Callable[[], None], device: "torch.device", seconds: float) -> float:
    """Tokens per second, the first step left out."""
    step()
    machine.wait_for(device)
    started, num_steps = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds or not num_steps:
        step()
        machine.wait_for(device)
        num_steps += 1
    taken = time.perf_counter() - started
    return num_steps * _ROWS * _TOKENS / taken


def _extras() -> dict[str, dict[str, Any]]:
    """Packages that each extra lacks; empty if the package was not installed but found on a path."""
    try:
        requirements = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    packages: dict[str, list[str]] = {name: [] for name in _PURPOSES}
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if found and found[2] in packages and found[1].replace("-", "_") != _PACKAGE:
            packages[found[2]].append(found[1])
    return {
        name: {
            "purpose": _PURPOSES[name],
            "missing": (missing := [one for one in sorted(names) if not _is_installed(one)]),
            "install": install_command(name) if missing else None,
        }
        for name, names in packages.items()
    }


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _page(report: dict[str, Any]) -> Iterator[str]:
    found = report["machine"]
    yield "This machine"
    sets = ", ".join(found["instruction_sets"]) or "unknown"
    if found["hidden_by_fst_isa"]:
        sets += f" ({machine.ISA_VARIABLE}={found['hidden_by_fst_isa']} hides the others)"
    memory = found["memory_bytes"]
    rows = [
        ("processor", f"{found['processor']}, {found['system']}"),
        ("instructions", sets),
        ("cores", f"{found['cores']} of {found['cores_of_the_machine']} may be used"),
        ("memory", "unknown" if memory is None else f"{memory / _BYTES_PER_GIGABYTE:.1f} GB"),
        *(("device", _device_words(device)) for device in found["devices"]),
        ("compiler", found["compiler"] or "none; a C++ compiler such as g++ serves torch.compile"),
        ("versions", ", ".join(f"{name} {value}" for name, value in found["versions"].items())),
    ]
    yield from _rows(rows)
    if report["decisions"]:
        yield "\nWhat follows"
        yield from _rows([*report["decisions"].items()])
    else:
        yield f"\nPyTorch is not installed, so nothing was measured: {install_command('train')}"
    if report["speed"]:
        yield from _speed_lines(report["speed"])
    yield "\nExtras"
    if not report["extras"]:
        yield "  unknown: the package is not installed here; pip install it"
    for name, extra in report["extras"].items():
        state = "installed"
        if extra["missing"]:
            state = f"lacks {', '.join(extra['missing'])}: {extra['install']}"
        yield f"  {name:<14}{state}  ({extra['purpose']})"


def _device_words(device: dict[str, Any]) -> str:
    memory = device["memory_bytes"]
    size = "" if memory is None else f", {memory / _BYTES_PER_GIGABYTE:.0f} GB"
    return f"{device['name']}{size}"


def _speed_lines(speed: dict[str, Any]) -> Iterator[str]:
    if "not_measured" in speed:
        yield f"\nSpeed was not measured: {speed['not_measured']}"
        return
    yield f"\nSpeed of {speed['device']}, while other work may share it"
    products = ", ".join(f"{name} {value:,}" for name, value in speed["gigaflops"].items())
    rows = [
        ("products", f"{products} GFLOP/s"),
        ("memory", f"{speed['memory_gigabytes_per_second']} GB/s read and written by a copy"),
    ]
    yield from _rows(rows)
    yield f"  training with Muon, batches of {_ROWS} x {_TOKENS} tokens:"
    for name, rate in speed["training_tokens_per_second"].items():
        words = f"{rate['tokens_per_second']:,} tokens/s"
        yield f"    --model_config {name:<6}{words:>20}  {rate['how']}"


def _rows(rows: list[tuple[str, str]]) -> Iterator[str]:
    yield from (f"  {name:<14}{value}" for name, value in rows)
