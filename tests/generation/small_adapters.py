"""Small random adapters, as PEFT writes them."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.modelling.adapter_weights import AdapterWeights, LowRank, read_adapter
from full_stack_transformer.modelling.adapters import merge_adapter

ATTENTION = ("q_proj", "v_proj")


def linear_names(backbone: Backbone, endings: Collection[str] = ()) -> list[str]:
    """The linear layers whose names end so; all but the head without endings."""
    head = backbone.get_output_embeddings()
    return [
        name
        for name, part in backbone.named_modules()
        if type(part).__name__ in ("Linear", "Conv1D")
        and (name.rpartition(".")[2] in endings if endings else part is not head)
    ]


def write_adapter(
    directory: Path,
    backbone: Backbone,
    *,
    endings: Collection[str] = (),
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    seed: int = 0,
    others: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """An adapter whose matrices matter for every result.

    Args:
        endings: of the layers' names.
        rank: of all layers but those in `ranks`, by their endings.
        others: tensors beside the matrices.
        config: fields that are not as usual.
    """
    directory.mkdir(parents=True, exist_ok=True)
    numbers = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = dict(others or {})
    for name in linear_names(backbone, endings):
        own = (ranks or {}).get(name.rpartition(".")[2], rank)
        down, up = _matrices(backbone.get_submodule(name), own, numbers)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(tensors, directory / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": linear_names(backbone, endings),
        "rank_pattern": dict(ranks or {}),
        "fan_in_fan_out": backbone.config.model_type == "gpt2",
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


def adapter_weights(
    backbone: Backbone, *, rank: int, seed: int, endings: Collection[str] = ()
) -> AdapterWeights:
    """One that was never written."""
    numbers = torch.Generator().manual_seed(seed)
    layers = {
        name: LowRank(*_matrices(backbone.get_submodule(name), rank, numbers))
        for name in linear_names(backbone, endings)
    }
    return AdapterWeights(Path("adapter"), layers)


def _matrices(layer: nn.Module, rank: int, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """Down and up, which change the outputs about as much as the layer makes them."""
    assert isinstance(layer.weight, Tensor)
    rows, columns = layer.weight.shape
    num_outputs, num_inputs = (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)
    size = float(layer.weight.detach().std())
    down = torch.randn(rank, num_inputs, generator=numbers)
    return down, torch.randn(num_outputs, rank, generator=numbers) * size / rank


def random_adapter(directory: Path, backbone: Backbone, **options: Any) -> AdapterWeights:
    """One that has been written and read."""
    return read_adapter(write_adapter(directory, backbone, **options), backbone)


def merged(directory: Path, backbone: Backbone) -> Backbone:
    """The base with an adapter added to its weights by PEFT."""
    base = directory.parent / f"base-{backbone.config.model_type}"
    if not base.exists():
        backbone.save_pretrained(base)
    return merge_adapter(directory, base=str(base)).eval()
