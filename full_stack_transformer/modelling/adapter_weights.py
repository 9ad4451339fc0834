"""The matrices of a LoRA adapter, for those who compute them beside a base that stays as it is.

    adapter directory ──read_adapter──> for each linear layer  outputs += up (down inputs)

Hu et al. 2021 (LoRA, arXiv 2106.09685), Kalajdzievski 2023 (rsLoRA, 2312.03732). Reads what PEFT writes,
without that package, and refuses what is more than two matrices beside a layer. Knows nothing of who
computes.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import ModelError
from full_stack_transformer.machine import check_free_memory
from full_stack_transformer.modelling.adapters import ADAPTER_WEIGHTS_NAME
from full_stack_transformer.modelling.other_files import ADAPTER_FILE_NAME, json_of

MAX_RANK = 256
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Fields of adapter_config.json that ask for more than two matrices where they say anything -> what it is.
_MORE = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal matrices",
    "lora_bias": "biases",
    "modules_to_save": "whole layers",
    "trainable_token_indices": "rows of embeddings",
    "target_parameters": "weights that belong to no linear layer",
    "layer_replication": "repeated layers",
    "megatron_config": "layers of Megatron",
    "alora_invocation_tokens": "words that switch it on",
    "arrow_config": "a choice among adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# What names of layers are written with in patterns: letters, any letter, and any number of them.
_PATTERN = re.compile(r"(?:\w|\.\*|\\?\.)+")
_STEP = re.compile(r"\.\*|\\?\.|\w")
_MAX_PATTERN_CHARACTERS = 65_536
# Of a rank or an alpha.
_MOST = 1e9
# Ways to begin that take something out of the base's weights.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """Two matrices beside a linear layer, in fp32."""

    down: Tensor
    """(rank, inputs)."""
    up: Tensor
    """(outputs, rank), times the adapter's scaling."""

    @property
    def rank(self) -> int:
        """Numbers between the two."""
        return len(self.down)


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter that fits its base."""

    directory: Path
    layers: Mapping[str, LowRank]
    """By the names of the base's linear layers."""

    @property
    def num_weights(self) -> int:
        """In all matrices."""
        return sum(one.down.numel() + one.up.numel() for one in self.layers.values())


def read_adapter(directory: Path, backbone: Backbone) -> AdapterWeights:
    """Read an adapter directory for the base that it will stand beside.

    Raises:
        ModelError: it is no LoRA adapter, it is more than low-rank matrices, or it does not fit the base.
        MachineError: memory is short.
    """
    config = json_of(directory / ADAPTER_FILE_NAME)
    if not config:
        raise ModelError(
            f"{directory} is no adapter: it has no readable {ADAPTER_FILE_NAME}; name a directory that fst "
            "train --lora_rank or PEFT has written"
        )
    if not (directory / ADAPTER_WEIGHTS_NAME).is_file():
        raise ModelError(
            f"the adapter {directory} has no {ADAPTER_WEIGHTS_NAME}; open it with PEFT and save it again: "
            "save_pretrained"
        )
    problem = next(_more_than_matrices(config), None)
    if problem is not None:
        raise _cannot_stand_beside(directory, problem)
    try:
        with safe_open(directory / ADAPTER_WEIGHTS_NAME, framework="pt", device="cpu") as file:
            names_of_all: list[str] = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names_of_all}
            names = _layer_names(directory, shapes)
            for name in names:
                _check_layer(directory, config, backbone, name, shapes)
            num_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
            check_free_memory(num_bytes, f"the adapter {directory}", torch.device("cpu"))
            layers = {
                name: _read_layer(config, name, (file.get_tensor(key) for key in _keys(name)))
                for name in names
            }
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{directory / ADAPTER_WEIGHTS_NAME} cannot be read: {error}; get the adapter again"
        ) from error
    broken = [
        name
        for name, one in layers.items()
        if not bool(one.down.isfinite().all() and one.up.isfinite().all())
    ]
    if broken:
        raise ModelError(
            f"the adapter {directory} has numbers that are NaN or infinite ({broken[0]}); it is broken, "
            "train it again"
        )
    return AdapterWeights(directory, layers)


def _cannot_stand_beside(directory: Path, problem: str) -> ModelError:
    return ModelError(
        f"the adapter {directory} cannot stand beside its base: {problem}; merge the two instead: fst merge "
        f"{directory}"
    )


def _more_than_matrices(config: Mapping[str, Any]) -> Iterator[str]:
    """Why an adapter is more than two matrices beside each of some linear layers."""
    if config.get("peft_type") != "LORA":
        yield f"it is no LoRA, but {config.get('peft_type')}"
    for name, what in _MORE.items():
        if config.get(name):
            yield f"it has {what} ({name})"
    if config.get("bias", "none") != "none":
        yield f"it has biases (bias is {config['bias']!r})"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        yield f"its training changed the base (init_lora_weights is {start!r})"
    if not _has_numbers(config):
        yield (
            "its rank or its alpha is no number, or named by another pattern than letters, . and .* (r, "
            "lora_alpha, rank_pattern, alpha_pattern)"
        )


def _has_numbers(config: Mapping[str, Any]) -> bool:
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        return False
    names = [name for pattern in patterns for name in pattern]
    if sum(map(len, names)) > _MAX_PATTERN_CHARACTERS or not all(map(_PATTERN.fullmatch, names)):
        return False
    numbers = [config.get("r"), config.get("lora_alpha")]
    numbers += [number for pattern in patterns for number in pattern.values()]
    # NaN and infinity are what Python's JSON reads, too.
    return all(
        isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < _MOST
        for one in numbers
    )


def _layer_names(directory: Path, names: Mapping[str, Sequence[int]]) -> list[str]:
    """The layers whose matrices a file has; both of each.

    Raises:
        ModelError: it has something else.
    """
    if not names:
        raise ModelError(f"the adapter {directory} is empty: it has no matrices; train it again")
    found = {}
    for name in names:
        for end in (_DOWN, _UP):
            if name.startswith(_PREFIX) and name.endswith(end):
                found[name] = name.removeprefix(_PREFIX).removesuffix(end)
    others = sorted(set(names) - set(found))
    if any(".lora_embedding_" in name for name in others):
        raise _cannot_stand_beside(directory, f"it changes embeddings ({others[0]})")
    if others:
        raise _cannot_stand_beside(
            directory, f"it has more than matrices of linear layers ({others[0]})"
        )
    layers = sorted(set(found.values()))
    for name in layers:
        missing = set(_keys(name)) - set(names)
        if missing:
            raise ModelError(
                f"the adapter {directory} lacks {missing.pop()}, whose other half is there; get it again"
            )
    return layers


def _keys(name: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}{_DOWN}", f"{_PREFIX}{name}{_UP}"


def _check_layer(
    directory: Path,
    config: Mapping[str, Any],
    backbone: Backbone,
    name: str,
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Compare the shapes of a layer's matrices with those of the base's layer, and with the configuration.

    Raises:
        ModelError: they differ.
    """
    base = config.get("base_model_name_or_path") or "a model that it does not name"
    advice = f"it was trained on {base}; name that model, or merge the two: fst merge {directory}"
    try:
        layer = backbone.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"the adapter {directory} does not fit: the base has no layer {name}; {advice}"
        ) from None
    if type(layer).__name__ not in ("Linear", "Conv1D"):
        kind = type(layer).__name__
        raise _cannot_stand_beside(directory, f"{name} is no linear layer, but of class {kind}")
    down, up = (list(shapes[key]) for key in _keys(name))
    rank = int(_of_layer(config, "rank_pattern", "r", name))
    num_outputs, num_inputs = _size_of(layer)
    expected = [rank, num_inputs], [num_outputs, rank]
    if (down, up) != expected:
        raise ModelError(
            f"the adapter {directory} does not fit: its matrices for {name} have sizes {down} and {up}, not "
            f"{expected[0]} and {expected[1]}; {advice}"
        )
    if not 1 <= rank <= MAX_RANK:
        raise _cannot_stand_beside(
            directory,
            f"its rank is {rank} at {name}, and at most {MAX_RANK} are computed beside a base",
        )


def _size_of(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs; GPT-2's Conv1D has its weights the other way round."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)


def _read_layer(config: Mapping[str, Any], name: str, halves: Iterator[Tensor]) -> LowRank:
    down, up = halves
    rank = len(down)
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    scaling = _of_layer(config, "alpha_pattern", "lora_alpha", name) / divisor
    # A copy: what is mapped would change with its file.
    return LowRank(
        down.to(torch.float32, copy=True).contiguous(), (up.float() * scaling).contiguous()
    )


def _of_layer(config: Mapping[str, Any], pattern: str, usual: str, name: str) -> float:
    """What a configuration says of a layer: the first pattern that its name ends with, or what all have."""
    for ending, value in (config.get(pattern) or {}).items():
        if _ends_with(name, ending):
            return float(value)
    return float(config[usual])


def _ends_with(name: str, pattern: str) -> bool:
    """Whether a layer's name, or what follows a dot in it, matches a pattern.

    As PEFT's regular expressions do, of which some would keep the interpreter for hours.
    """
    places = {0, *(place + 1 for place, letter in enumerate(name) if letter == ".")}
    for step in _STEP.findall(pattern):
        if step == ".*":
            places = set(range(min(places), len(name) + 1))
        else:
            places = {
                place + 1 for place in places if step == "." or name[place : place + 1] == step[-1]
            }
        if not places:
            return False
    return len(name) in places
