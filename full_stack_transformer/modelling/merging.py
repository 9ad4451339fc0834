"""`fst merge`: an adapter and the model that it was trained on -> a plain model directory.

ADAPTER DIRECTORY + base ──> MODEL DIRECTORY      EXPERIMENT/adapter + base ──> EXPERIMENT/model
"""

import logging
import shlex
from pathlib import Path

from full_stack_transformer.arguments.models import MergeArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.modelling.adapters import merge_adapter
from full_stack_transformer.modelling.backbones import num_parameters
from full_stack_transformer.modelling.model_card import BASE_KEY
from full_stack_transformer.modelling.other_files import (
    ADAPTER_DIRECTORY_NAME,
    MODEL_DIRECTORY_NAME,
    json_of,
)
from full_stack_transformer.modelling.places import adapter_directory, base_of
from full_stack_transformer.modelling.pretrained import read_start
from full_stack_transformer.modelling.writing import written_whole
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME, write_json
from full_stack_transformer.tokenization.document_tokenizer import copy_tokenizer_files
from full_stack_transformer.tokenization.transformers_tokenizer import open_tokenizer

logger = logging.getLogger(__name__)

# In description.json of a merged model: what it was made of.
_MERGED_KEY = "merged_from"


def main(arguments: MergeArguments) -> Path:
    """Write the merged model, and return its directory.

    Raises:
        UsageError: the output exists.
        ModelError: there is no adapter, or it does not fit its base.
        MachineError: the disk is full or cannot be written.
        MissingExtraError: peft is not installed.
    """
    directory = adapter_directory(arguments.adapter)
    target = arguments.output_dir or _default_target(directory)
    if target.exists() and not _was_merged(target):
        raise UsageError(f"{target} exists; remove it, or name another directory with --output_dir")
    base = arguments.base or base_of(directory)
    backbone = merge_adapter(directory, base=base)
    facts = json_of(directory / DESCRIPTION_FILE_NAME)
    description = {
        **{key: value for key, value in facts.items() if key != BASE_KEY},
        "num_parameters": num_parameters(backbone),
        _MERGED_KEY: {"adapter": str(directory.resolve()), "base": base},
    }
    with written_whole(target, "the merged model") as partial:
        read_start(base).save(backbone, partial)
        _copy_tokenizer(directory, base, partial)
        write_json(partial / DESCRIPTION_FILE_NAME, description)
    name = directory.parent if target == directory.parent / MODEL_DIRECTORY_NAME else target
    logger.info(
        "merged %s into %s; serve it: fst serve %s", directory, base, shlex.quote(str(name))
    )
    return target


def _default_target(directory: Path) -> Path:
    if directory.name == ADAPTER_DIRECTORY_NAME and (directory.parent / "arguments.json").is_file():
        return directory.parent / MODEL_DIRECTORY_NAME
    return directory.with_name(f"{directory.resolve().name}-merged")


def _was_merged(target: Path) -> bool:
    return _MERGED_KEY in json_of(target / DESCRIPTION_FILE_NAME)


def _copy_tokenizer(directory: Path, base: str, target: Path) -> None:
    """The adapter's own tokenizer where it has one, else that of the base."""
    for source in (directory, Path(base)):
        if (source / "tokenizer_config.json").is_file():
            copy_tokenizer_files(source, target)
            return
    open_tokenizer(base).save_pretrained(target)
