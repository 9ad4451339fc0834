"""`fst average_checkpoints`: the mean of the weights of several models, as one model directory.

The last checkpoints of a training, or of trainings that started from the same weights, lie in the same valley
of the loss; their mean is often better than each of them (Izmailov et al. 2018, SWA; Wortsman et al. 2022,
model soups). This does not work for models with different initial weights.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from full_stack_transformer.arguments.models import AverageCheckpointsArguments
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.modelling.backbones import context_length, num_parameters
from full_stack_transformer.modelling.checkpoint_parts import read_checkpoint
from full_stack_transformer.modelling.model_card import model_card
from full_stack_transformer.modelling.model_directory import (
    OpenedModel,
    open_model,
    save_model_directory,
)
from full_stack_transformer.modelling.model_files import find_model_directory
from full_stack_transformer.modelling.pretrained import read_start
from full_stack_transformer.modelling.writing import CARD_FILE_NAME
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME, make_directories
from full_stack_transformer.tasks.catalogue import DEFAULT_TASK

logger = logging.getLogger(__name__)

# Fields of a config that say where it comes from, not what the model computes.
_ORIGIN_FIELDS = {"_name_or_path", "architectures", "dtype", "transformers_version"}
# Files of a model directory that do not belong to the tokenizer.
_MODEL_FILE_NAMES = {
    "config.json",
    "generation_config.json",
    DESCRIPTION_FILE_NAME,
    CARD_FILE_NAME,
}
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def main(arguments: AverageCheckpointsArguments) -> Path:
    """Write the mean of the models, with equal weights, and return its directory.

    Raises:
        UsageError: --output_dir exists.
        ModelError: a model cannot be opened, or its shape or tokenizer differs from the first.
        MachineError: the disk is full or cannot be written.
    """
    target, paths = arguments.output_dir, arguments.models
    if target.exists():
        raise UsageError(f"--output_dir {target} exists; name a directory that does not")
    first = open_model(paths[0], device="cpu")
    sources = [_source(first, paths[0])]
    datasets = [first.description.get("dataset")]
    total = {name: weight.double() for name, weight in _weights(first).items()}
    for path in paths[1:]:
        model = open_model(path, device="cpu")
        _check_same_kind(first, paths[0], model, path)
        for name, weight in _weights(model).items():
            total[name] += weight
        sources.append(_source(model, path))
        datasets.append(model.description.get("dataset"))
    for name, weight in _weights(first).items():
        # In fp64, so that the mean of equal weights is the same weight.
        weight.copy_((total[name] / len(paths)).to(weight.dtype))
    _save(target, first, paths[0], sources, datasets[0] if _all_equal(datasets) else None)
    logger.info("averaged %s models; serve the result: fst serve %s", len(paths), target)
    return target


def _weights(model: OpenedModel) -> dict[str, Tensor]:
    """The weights by name, tied ones only once."""
    return {name: weight.detach() for name, weight in model.backbone.named_parameters()}


def _check_same_kind(first: OpenedModel, first_path: Path, model: OpenedModel, path: Path) -> None:
    ours, theirs = (
        {
            name: value
            for name, value in opened.backbone.config.to_dict().items()
            if name not in _ORIGIN_FIELDS
        }
        for opened in (first, model)
    )
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise ModelError(
                f"{path} has {name} {theirs.get(name)!r}, {first_path} has {ours.get(name)!r}; only models "
                "of the same shape can be averaged"
            )
    if model.tokenizer.backend.to_str() != first.tokenizer.backend.to_str():
        raise ModelError(
            f"{path} has another tokenizer than {first_path}; the same embedding would mean another token"
        )


def _source(model: OpenedModel, path: Path) -> dict[str, Any]:
    """The entry of an averaged model in the description."""
    if path.suffix != ".ckpt":
        facts = {name: model.description.get(name) for name in ("step", "validation_loss")}
        return {"model": model.name, **facts}
    # The description beside a checkpoint belongs to the best model.
    return {"model": f"{model.name}/{path.name}", "step": read_checkpoint(path)["global_step"]}


def _all_equal(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def _save(
    target: Path,
    model: OpenedModel,
    path: Path,
    sources: list[dict[str, Any]],
    dataset: dict[str, Any] | None,
) -> None:
    backbone = model.backbone
    description = {
        "task": DEFAULT_TASK,
        "model_type": backbone.config.model_type,
        "num_parameters": num_parameters(backbone),
        "context_length": context_length(backbone.config),
        "averaged_from": sources,
        **({} if dataset is None else {"dataset": dataset}),
    }
    make_directories(target.absolute().parent)
    with _tokenizer_files(find_model_directory(path)) as directory:
        save_model_directory(
            target,
            backbone,
            tokenizer_directory=directory,
            description=description,
            start=read_start(str(find_model_directory(path))),
            card=model_card(description, {}, []),
        )


@contextmanager
def _tokenizer_files(model_directory: Path) -> Iterator[Path]:
    """A directory with copies of the tokenizer files of a model directory."""
    with tempfile.TemporaryDirectory() as directory:
        for file in model_directory.iterdir():
            is_weights = file.name.endswith(_WEIGHT_SUFFIXES)
            if file.is_file() and file.name not in _MODEL_FILE_NAMES and not is_weights:
                shutil.copyfile(file, Path(directory, file.name))
        yield Path(directory)
