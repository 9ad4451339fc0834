"""From token vectors to the vector of a text: pooling, layers, losses, files for sentence-transformers.

    config.json  model.safetensors  tokenizer.json …   the transformer
    modules.json                                       the order of the modules:
    1_Pooling/config.json                              token vectors -> one vector
    2_Dense/config.json, model.safetensors             an affine map, such as a whitening
    3_Normalize/                                       length 1

`SentenceTransformer(DIRECTORY)` opens such a directory too and gives the same vectors. The files are
written with the names that every version from 3.0 on reads. Knows nothing of the transformer but its size.

Shapes: B texts, T tokens, H width of the model, D width of an embedding.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from full_stack_transformer.errors import ModelError
from full_stack_transformer.storage import write_json, write_text

PoolingMode = Literal["cls", "mean", "max", "first_last_avg", "last"]
"""cls: the first token. last: the last one, which alone has seen the whole text in a causal model.
first_last_avg: the mean over tokens and over the outputs of the first and the last layer (Su et al. 2021)."""

POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)

MODULES_FILE_NAME = "modules.json"
_TRANSFORMER_FILE_NAME = "sentence_bert_config.json"
_MODEL_FILE_NAME = "config_sentence_transformers.json"
_CONFIG_FILE_NAME = "config.json"
_WEIGHTS_FILE_NAME = "model.safetensors"
_TYPE_PREFIX = "sentence_transformers.models."
# Names of the poolings in both libraries; exactly one of these keys is true.
_POOLING_KEYS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES: dict[str, PoolingMode] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "lasttoken": "last",
}
_LINEAR = "torch.nn.modules.linear.Identity"
_ACTIVATIONS = {_LINEAR: torch.nn.Identity(), "torch.nn.modules.activation.Tanh": torch.nn.Tanh()}


def needs_first_layer(mode: PoolingMode) -> bool:
    """Whether `pool` takes the output of the first layer too (`output_hidden_states`, number 1)."""
    return mode == "first_last_avg"


def pool(
    last: Tensor, attention_mask: Tensor, mode: PoolingMode, *, first: Tensor | None = None
) -> Tensor:
    """A vector for each text: (B, H).

    Args:
        last: (B, T, H) output of the last layer.
        attention_mask: (B, T) 1 where a token is, 0 where padding is, on whichever side.
        mode: how.
        first: (B, T, H) output of the first layer, where `needs_first_layer`.

    Raises:
        ValueError: `first` is missing.
    """
    mask = attention_mask.to(torch.bool)
    rows = torch.arange(len(last), device=last.device)
    if mode == "cls":
        return last[rows, mask.int().argmax(dim=1)]
    if mode == "last":
        return last[rows, mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)]
    if mode == "max":
        return last.masked_fill(~mask[..., None], float("-inf")).amax(dim=1)
    if mode == "first_last_avg":
        if first is None:
            raise ValueError("first_last_avg needs the output of the first layer too")
        last = (first + last) / 2
    weights = mask[..., None].to(last.dtype)
    return (last * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class Dense:
    """x -> activation(x @ weight.T + bias)."""

    weight: Tensor
    """(width after, width before)"""
    bias: Tensor | None
    activation: str = _LINEAR

    def __call__(self, vectors: Tensor) -> Tensor:
        """(B, width before) -> (B, width after)."""
        moved: Tensor = _ACTIVATIONS[self.activation](
            torch.nn.functional.linear(vectors, self.weight, self.bias)
        )
        return moved


@dataclass(frozen=True)
class Head:
    """The layers between the transformer's token vectors and the vector of the text."""

    pooling: PoolingMode = "mean"
    denses: tuple[Dense, ...] = ()
    is_normalized: bool = False
    """Whether vectors are scaled to length 1."""

    def __call__(
        self, last: Tensor, attention_mask: Tensor, *, first: Tensor | None = None
    ) -> Tensor:
        """(B, T, H) -> (B, D); the arguments are those of `pool`."""
        vectors = pool(last, attention_mask, self.pooling, first=first)
        for dense in self.denses:
            vectors = dense(vectors)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.is_normalized else vectors


@dataclass(frozen=True)
class _Module:
    """A folder of a model directory."""

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def write_head(
    directory: Path,
    head: Head,
    *,
    hidden_size: int,
    num_layers: int,
    max_length: int,
) -> None:
    """Add the files of sentence-transformers to a model directory.

    Args:
        directory: holds the transformer and its tokenizer.
        head: the layers after the transformer.
        hidden_size: width of the transformer.
        num_layers: of the transformer.
        max_length: maximum tokens of a text.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    transformer: dict[str, Any] = {"max_seq_length": max_length, "do_lower_case": False}
    if needs_first_layer(head.pooling):
        transformer["config_args"] = {"output_hidden_states": True}
    modules = list(_modules(head, hidden_size, num_layers))
    entries = [{"idx": 0, "name": "0", "path": "", "type": f"{_TYPE_PREFIX}Transformer"}]
    for number, module in enumerate(modules, 1):
        name = f"{number}_{module.kind}"
        entries.append(
            {"idx": number, "name": str(number), "path": name, "type": _TYPE_PREFIX + module.kind}
        )
        (directory / name).mkdir(exist_ok=True)
        if module.config:
            write_json(directory / name / _CONFIG_FILE_NAME, module.config)
        if module.tensors:
            save_file(module.tensors, directory / name / _WEIGHTS_FILE_NAME)
    write_json(directory / _TRANSFORMER_FILE_NAME, transformer)
    write_json(
        directory / _MODEL_FILE_NAME,
        {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    # Written last, since it says that the others exist.
    write_text(directory / MODULES_FILE_NAME, json.dumps(entries, indent=2) + "\n")


def _modules(head: Head, hidden_size: int, num_layers: int) -> Iterator[_Module]:
    """The modules after the transformer, in order."""
    pooling: PoolingMode = head.pooling
    if needs_first_layer(head.pooling):
        # The mean over tokens is linear: averaging the layers first gives the same.
        config = {"layer_start": 0, "num_hidden_layers": num_layers}
        yield _Module(
            "WeightedLayerPooling",
            {"word_embedding_dimension": hidden_size, **config},
            {"layer_weights": _first_and_last(num_layers + 1)},
        )
        pooling = "mean"
    modes = {key: name == pooling for key, name in _POOLING_KEYS.items()}
    yield _Module("Pooling", {"word_embedding_dimension": hidden_size, **modes})
    for dense in head.denses:
        yield _Module("Dense", _dense_config(dense), _dense_tensors(dense))
    if head.is_normalized:
        yield _Module("Normalize")


def read_head(directory: Path, *, device: torch.device) -> tuple[Head, int | None]:
    """The head, and the maximum tokens of a text if the files say so.

    Raises:
        ModelError: modules.json has an unknown module, or a file is damaged.
    """
    if not (directory / MODULES_FILE_NAME).is_file():
        return Head(), None
    try:
        pooling: PoolingMode = "mean"
        denses: list[Dense] = []
        is_layered = is_normalized = False
        for entry in json.loads((directory / MODULES_FILE_NAME).read_text("utf-8")):
            folder, kind = directory / entry["path"], entry["type"].rpartition(".")[2]
            if kind == "WeightedLayerPooling":
                is_layered = _is_first_and_last(folder)
            elif kind == "Pooling":
                pooling = _pooling_of(_read(folder))
            elif kind == "Dense":
                denses.append(_open_dense(folder, device))
            elif kind == "Normalize":
                is_normalized = True
            elif kind != "Transformer":
                raise ValueError(f"unknown module {entry['type']}")
        if is_layered and pooling != "mean":
            raise ValueError(f"layers are averaged, but tokens pooled by {pooling}")
        transformer = directory / _TRANSFORMER_FILE_NAME
        max_length = _read(directory, transformer.name).get("max_seq_length")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{directory / MODULES_FILE_NAME} should describe a model of sentence-transformers: {error}"
        ) from error
    head = Head("first_last_avg" if is_layered else pooling, tuple(denses), is_normalized)
    return head, max_length


def _read(folder: Path, name: str = _CONFIG_FILE_NAME) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if (folder / name).is_file():
        content = json.loads((folder / name).read_text("utf-8"))
    return content


def _pooling_of(config: dict[str, Any]) -> PoolingMode:
    named = config.get("pooling_mode")
    if named is None:
        known = [key for key in config if key.startswith("pooling_mode_") and config[key]]
        modes = [_POOLING_KEYS.get(key) for key in known] or ["mean"]
    else:
        names = [named] if isinstance(named, str) else list(named)
        modes = [_POOLING_NAMES.get(name) for name in names]
    if len(modes) != 1 or modes[0] is None:
        raise ValueError(f"unknown pooling: {config}")
    return modes[0]


def _is_first_and_last(folder: Path) -> bool:
    """Whether the layers are averaged as in `first_last_avg`; other weights raise ValueError."""
    weights = load_file(folder / _WEIGHTS_FILE_NAME)["layer_weights"]
    start = _read(folder)["layer_start"]
    full = torch.cat([torch.zeros(start), weights])
    if not torch.allclose(full / full.sum(), _first_and_last(len(full)) / 2):
        raise ValueError("unknown weights of layers")
    return True


def _first_and_last(num_states: int) -> Tensor:
    """Weights of the embeddings, the first layer … the last layer; a single layer is both."""
    weights = torch.zeros(num_states)
    weights[1] += 1
    weights[-1] += 1
    return weights


def _dense_config(dense: Dense) -> dict[str, Any]:
    after, before = dense.weight.shape
    return {
        "in_features": before,
        "out_features": after,
        "bias": dense.bias is not None,
        "activation_function": dense.activation,
    }


def _dense_tensors(dense: Dense) -> dict[str, Tensor]:
    tensors = {"linear.weight": dense.weight.cpu()}
    if dense.bias is not None:
        tensors["linear.bias"] = dense.bias.cpu()
    return tensors


def _open_dense(folder: Path, device: torch.device) -> Dense:
    config = _read(folder)
    if config["activation_function"] not in _ACTIVATIONS or config.get("use_residual"):
        raise ValueError(f"unknown Dense layer: {config}")
    tensors = load_file(folder / _WEIGHTS_FILE_NAME, device=str(device))
    return Dense(
        tensors["linear.weight"].float(),
        tensors["linear.bias"].float() if config.get("bias", True) else None,
        config["activation_function"],
    )


def simcse_losses(
    first: Tensor, second: Tensor, *, temperature: float, negatives: Tensor | None = None
) -> Tensor:
    """Contrastive loss of each text: its partner against those of the others in the batch: (B,).

    Gao, Yao and Chen 2021, SimCSE (arXiv 2104.08821). Unsupervised, equation 1: `second` are the same
    texts, encoded again with other dropout. Supervised, equation 5: `second` are texts that mean the
    same, `negatives` texts that do not. The paper's temperature is 0.05.

    Args:
        first: (B, D).
        second: (B, D) row i is the partner of row i.
        temperature: of the softmax over cosines.
        negatives: (N, D) texts that are no partners.
    """
    candidates = second if negatives is None else torch.cat([second, negatives])
    cosines = cosine_similarity(first[:, None].float(), candidates[None].float(), dim=-1)
    targets = torch.arange(len(first), device=first.device)
    return cross_entropy(cosines / temperature, targets, reduction="none")


def cosine_losses(first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
    """Squared difference of each pair's cosine and its score: (B,).

    Reimers and Gurevych 2019, Sentence-BERT (arXiv 1908.10084), section 3, "regression objective".

    Args:
        first: (B, D).
        second: (B, D).
        scores: (B,) similarity, -1 to 1.
    """
    return (cosine_similarity(first.float(), second.float(), dim=-1) - scores.float()) ** 2
