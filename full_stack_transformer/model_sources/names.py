"""Hub names in place of models of a command: imported once into data/models, then used from there.

Never imports torch before the hub has answered, so that a mistake is told at once.
"""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any, TypeVar

from full_stack_transformer.arguments.models import ImportModelArguments
from full_stack_transformer.errors import FullStackTransformerError, UsageError
from full_stack_transformer.model_sources.hub import find
from full_stack_transformer.modelling.places import IMPORTED_KEY, adapter_at, base_of
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME, read_json

logger = logging.getLogger(__name__)

_OWNER_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Options that name a model; of the last kind each is NAME=MODEL.
_FIELDS, _LISTS, _NAMED_LISTS = (
    ("model", "draft_model", "model_path", "teacher", "compare"),
    ("models",),
    ("more_models",),
)

Options = TypeVar("Options")


def with_imported_models(options: Options) -> Options:
    """The options with directories in place of hub names.

    Raises:
        UsageError: a directory of that name holds another model.
        ModelError: there is no such model on the hub, or it cannot be opened.
        MachineError: the hub cannot be reached.
    """
    changed: dict[str, Any] = {}
    for name in _FIELDS:
        value = getattr(options, name, None)
        if is_hub_name(value):
            directory = _imported(str(value))
            changed[name] = str(directory) if isinstance(value, str) else directory
    for name in _LISTS:
        values = getattr(options, name, ())
        if any(map(is_hub_name, values)):
            changed[name] = tuple(
                Path(_imported(str(one))) if is_hub_name(one) else one for one in values
            )
    for name in _NAMED_LISTS:
        pairs = [one.partition("=") for one in getattr(options, name, ())]
        if any(is_hub_name(path) for _, _, path in pairs):
            changed[name] = tuple(
                f"{key}={_imported(path) if is_hub_name(path) else path}" for key, _, path in pairs
            )
    options = dataclasses.replace(options, **changed) if changed else options  # type: ignore[type-var]
    _import_bases(options)
    return options


def _import_bases(options: object) -> None:
    """Import what the adapters among the models were trained on: `find_model` then finds it here."""
    if not hasattr(options, "base"):
        return
    more = [Path(one.partition("=")[2]) for one in getattr(options, "more_models", ())]
    given = [(getattr(options, name, None), options.base) for name in ("model", "checkpoint")]
    for path, base in [*given, *((one, None) for one in more)]:
        adapter = adapter_at(path) if isinstance(path, Path) else None
        if adapter is None or not is_hub_name(name := base or base_of(adapter)):
            continue
        try:
            _imported(name)
        except FullStackTransformerError as error:
            raise type(error)(
                f"the adapter {adapter} needs its base {name}; name its directory with --base ({error})"
            ) from error


def is_hub_name(value: object) -> bool:
    """Whether it is OWNER/NAME, and no path: neither it nor a directory OWNER is here."""
    text = str(value)
    if not isinstance(value, str | Path) or not _OWNER_AND_NAME.fullmatch(text):
        return False
    path = Path(text)
    return path.suffix not in (".ckpt", ".gguf") and not path.parent.exists()


def _imported(name: str) -> Path:
    """The directory of a hub model, imported now if it was not before."""
    options = ImportModelArguments(name)
    directory = options.models_root / name.partition("/")[2]
    if directory.exists():
        file = directory / DESCRIPTION_FILE_NAME
        origin = read_json(file).get(IMPORTED_KEY) if file.is_file() else None
        if origin != name:
            raise UsageError(
                f"{name} is no path here, and {directory} is another model"
                f"{f' (of {origin})' if origin else ''}; import it under another name: fst import_model "
                f"{name} --model_name OTHER"
            )
        logger.info("%s: using %s, imported before", name, directory)
        return directory
    find(name, revision=None)
    from full_stack_transformer.model_sources.import_model import import_model

    return import_model(options)
