"""The model directory: plain Hugging Face format, always complete, and our description beside it.

    config.json  model.safetensors  generation_config.json  tokenizer.json  tokenizer_config.json
    description.json   step, validation loss, the dataset's description
    README.md          the model card, where training made the directory

Opens a model directory, an experiment directory (its `model/`), a `.ckpt` of one, or an adapter directory,
which is added to the weights of its base.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.sampling import FOR_SMALL_MODELS
from full_stack_transformer.errors import ModelError
from full_stack_transformer.machine import memory_for
from full_stack_transformer.modelling.adapters import merge_adapter
from full_stack_transformer.modelling.backbones import backbone_of_config, convert
from full_stack_transformer.modelling.checkpoint_parts import read_checkpoint
from full_stack_transformer.modelling.model_files import check_tokenizer_files
from full_stack_transformer.modelling.other_files import (
    ADAPTER_DIRECTORY_NAME,
    MODEL_DIRECTORY_NAME,
)
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.modelling.pretrained import (
    StartFacts,
    load_backbone,
    open_config,
    reason_of,
)
from full_stack_transformer.modelling.writing import CARD_FILE_NAME, written_whole
from full_stack_transformer.quantization.files import open_rounded
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    read_json,
    write_json,
    write_text,
)
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    open_saved_tokenizer,
)

# Prefix of the backbone's weights in a checkpoint.
CHECKPOINT_BACKBONE_PREFIX = "backbone."


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to use, in evaluation mode."""

    name: str
    backbone: Backbone
    tokenizer: DocumentTokenizer
    description: dict[str, Any]


def save_model_directory(
    target: Path,
    backbone: Backbone,
    *,
    tokenizer_directory: Path,
    description: dict[str, Any],
    start: StartFacts | None = None,
    card: str = "",
    weights: dict[str, Tensor] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a model directory, atomically: a reader never sees a partial one.

    Args:
        target: the model directory; an existing one stays until the new one is complete.
        backbone: the model.
        tokenizer_directory: files that are copied into it.
        description: content of description.json.
        start: of the model that it was trained from, whose type of weights and settings it keeps.
        card: content of README.md; not written if empty.
        weights: by the backbone's own names, if they are not those in `backbone` itself.
        finish: writes additional files into the directory.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    with written_whole(target, "the model directory") as partial:
        if start is not None:
            start.save(backbone, partial, weights)
        else:
            backbone.save_pretrained(partial, state_dict=weights)
            if backbone.can_generate():
                settings = GenerationConfig.from_model_config(backbone.config)
                settings.update(do_sample=True, **FOR_SMALL_MODELS)
                settings.save_pretrained(partial)
        shutil.copytree(tokenizer_directory, partial, dirs_exist_ok=True)
        write_json(partial / DESCRIPTION_FILE_NAME, description)
        if finish is not None:
            finish(partial)
        if card:
            write_text(partial / CARD_FILE_NAME, card)


def open_model(
    path: Path,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    weights_dtype: str = "float32",
) -> OpenedModel:
    """Open a model; see `find_model` for what `path` may be.

    Args:
        path: where the model is.
        base: of an adapter, if it is not the one that it names.
        device: where to compute.
        dtype: of full weights.
        weights_dtype: what it will compute with: weights that `fst quantize` has rounded to that are opened
            in place of the full ones.

    Raises:
        ModelError: there is no model, it is damaged, or tokenizer and weights do not match.
    """
    place = find_model(path, base)
    directory = place.directory
    check_tokenizer_files(place.tokenizer)
    tokenizer = open_saved_tokenizer(place.tokenizer)  # first: it is opened faster than the weights
    if place.adapter is not None:
        backbone = convert(merge_adapter(place.adapter, base=str(directory)), dtype)
    elif path.suffix == ".ckpt":
        backbone = backbone_of_checkpoint(path, directory, dtype)
    else:
        rounded = None
        if resolve_device(device).type == "cpu":
            rounded = open_rounded(directory, weights_dtype)
        backbone = rounded or load_backbone(str(directory), dtype=dtype)
    num_embeddings = backbone.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > num_embeddings:
        raise ModelError(
            f"{place.own}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model "
            f"{num_embeddings:,} embeddings; they do not match"
        )
    description_file = place.own / DESCRIPTION_FILE_NAME
    description = read_json(description_file) if description_file.is_file() else {}
    backbone = moved(backbone, resolve_device(device)).eval()
    return OpenedModel(name_of_model(place.own), backbone, tokenizer, description)


def moved(backbone: Backbone, device: torch.device) -> Backbone:
    """The backbone on a device, changed in place.

    Raises:
        MachineError: the device lacks the memory.
    """
    with memory_for(f"the model's weights on {device}"):
        on_device: Backbone = backbone.to(device)
        return on_device


def resolve_device(device: str) -> torch.device:
    """The torch device for `--device`; `auto` selects the fastest one here."""
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"--device {device} cannot be used here: {reason}") from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def backbone_of_checkpoint(
    path: Path, directory: Path, dtype: torch.dtype, model_class: Any = AutoModelForCausalLM
) -> Backbone:
    """The model with the weights of a checkpoint and the config of its model directory.

    Raises:
        ModelError: the checkpoint is damaged or belongs to another model.
    """
    try:
        state = read_checkpoint(path)["state_dict"]
        config = open_config(directory)
        backbone = backbone_of_config(config, model_class, str(directory))
        weights = {
            name.removeprefix(CHECKPOINT_BACKBONE_PREFIX): tensor
            for name, tensor in state.items()
            if name.startswith(CHECKPOINT_BACKBONE_PREFIX)
        }
        backbone.load_state_dict(weights)
    except Exception as error:  # a damaged zip raises anything
        raise ModelError(
            f"{path} is not a checkpoint of the model in {directory}: {reason_of(error)}"
        ) from error
    return convert(backbone, dtype)


def name_of_model(directory: Path) -> str:
    """NAME/VERSION for the model or adapter of an experiment, else the directory's name."""
    directory = directory.resolve()
    is_ours = directory.name in (MODEL_DIRECTORY_NAME, ADAPTER_DIRECTORY_NAME)
    if is_ours and directory.parent.name.isdecimal():
        return f"{directory.parent.parent.name}/{directory.parent.name}"
    return directory.name
