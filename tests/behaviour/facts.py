"""What is compared: files, tensors, JSON and curves, as hashes or as small plain values.

Knows file formats only: NumPy, safetensors, checkpoints of torch, TensorBoard's event files.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.compat.proto.event_pb2 import Event

Facts = dict[str, Any]

_NUM_DIGITS = 6
# What the clock, the machine or chance decide, under the names that files and answers give it.
VOLATILE = frozenset(
    {
        *("seconds_taken", "seconds", "tokens_per_second", "model_flops_utilization"),
        *("package_versions", "id", "experiment_id", "created", "loaded_at", "working_directory"),
    }
)
_VOLATILE_CURVES = ("memory/", "throughput/")
_MAX_PLAIN_CHARACTERS = 4000


def sha256(content: bytes | str) -> str:
    """The hash of bytes, or of a text in UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def hash_files(directory: Path, pattern: str) -> dict[str, str]:
    """The hash of each file by its path below `directory`."""
    found = (path for path in sorted(directory.glob(pattern)) if path.is_file())
    return {str(path.relative_to(directory)): sha256(path.read_bytes()) for path in found}


def hash_tensor(tensor: torch.Tensor) -> str:
    """The hash of kind, shape and every bit."""
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content)


def hash_weights(model_directory: Path) -> dict[str, str]:
    """The hash of each tensor of every safetensors file of a model directory."""
    return {
        f"{path.relative_to(model_directory)}: {name}": hash_tensor(tensor)
        for path in sorted(model_directory.rglob("*.safetensors"))
        for name, tensor in sorted(load_file(path).items())
    }


def checkpoint_facts(path: Path) -> Facts:
    """The tensors, the names of everything, and the state of optimizers, schedules and callbacks."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    hashed = {name: _with_hashes(value) for name, value in content.items()}
    return {
        "weights": hashed["state_dict"],
        "optimizers": hashed["optimizer_states"],
        "schedules": hashed["lr_schedulers"],
        "callbacks": without(hashed["callbacks"]),
        "keys": key_paths(hashed),
    }


def _with_hashes(value: Any) -> Any:
    """The same with hashes in the place of tensors, as JSON knows it."""
    if isinstance(value, torch.Tensor):
        return hash_tensor(value)
    if isinstance(value, dict):
        return {str(key): _with_hashes(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_hashes(one) for one in value]
    return value


def read_json(path: Path) -> Any:
    """The content of a JSON file without what is volatile, rounded."""
    return plain(json.loads(path.read_text(encoding="utf-8")))


def read_json_lines(path: Path) -> list[Any]:
    """The same of each line."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [plain(json.loads(line)) for line in file]


def plain(value: Any) -> Any:
    """A value without what is volatile, its numbers rounded."""
    return rounded(without(value))


def without(value: Any, names: Iterable[str] = VOLATILE) -> Any:
    """A value without the fields of these names, at any depth."""
    if isinstance(value, dict):
        return {key: without(one, names) for key, one in value.items() if key not in names}
    return [without(one, names) for one in value] if isinstance(value, list) else value


def rounded(value: Any) -> Any:
    """A value with its fractions rounded, at any depth."""
    if isinstance(value, float):
        return round(value, _NUM_DIGITS)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def key_paths(value: Any) -> list[str]:
    """The names of all fields, as paths; elements of a list share theirs."""
    return sorted(set(_paths(value, "")))


def _paths(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield f"{path}/{key}"
            yield from _paths(one, f"{path}/{key}")
    elif isinstance(value, list):
        for one in value:
            yield from _paths(one, f"{path}[]")


def curves(directory: Path) -> dict[str, list[Any]]:
    """The points of each curve that TensorBoard shows; only the number of those of time and memory."""
    points: dict[str, list[Any]] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for event in _events(path.read_bytes()):
            for value in event.summary.value:
                found = points.setdefault(value.tag, [])
                is_number = value.WhichOneof("value") == "simple_value"
                found.append([event.step, value.simple_value if is_number else "text"])
    return {
        tag: [step for step, _ in found] if tag.startswith(_VOLATILE_CURVES) else rounded(found)
        for tag, found in sorted(points.items())
    }


def _events(content: bytes) -> Iterator[Any]:
    """The records of an event file: length, its checksum, the event, its checksum."""
    start = 0
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        yield Event.FromString(content[start + 12 : start + 12 + length])
        start += length + 16


def short(value: Any) -> Any:
    """What a transcript holds of a value: itself, or its hash where it is long."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return value if len(text) <= _MAX_PLAIN_CHARACTERS else {"sha256": sha256(text)}


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Where two values differ, for a person."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in before or key not in after:
                yield f"{path}/{key}: only {'before' if key in before else 'now'}"
            else:
                yield from differences(before[key], after[key], f"{path}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{path}[{number}]")
    elif before != after:
        yield f"{path}: {str(before)[:200]!r} -> {str(after)[:200]!r}"
