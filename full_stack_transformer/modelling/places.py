"""Where the parts of a model are, which may be an adapter and its base.

    model directory, experiment, .ckpt ──┐
                                         ├──find_model──> ModelPlace
    adapter directory, experiment ───────┘ base: what adapter_config.json names, or --base

Never imports torch, so that a mistake is told at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from full_stack_transformer.arguments.models import (
    AdapterArguments,
    AnsweringArguments,
    ImportModelArguments,
)
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.modelling.model_files import (
    check_generates,
    check_model_files,
    check_start,
    check_tokenizer_files,
    find_model_directory,
    read_config,
)
from full_stack_transformer.modelling.other_files import (
    ADAPTER_DIRECTORY_NAME,
    ADAPTER_FILE_NAME,
    CONFIG_FILE_NAME,
    MODEL_DIRECTORY_NAME,
    found_at,
    json_of,
)
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME

IMPORTED_KEY = "imported_from"
"""In description.json of an imported model: the source, as it was typed."""


@dataclass(frozen=True)
class ModelPlace:
    """The directories of a model."""

    directory: Path
    """With config, weights and generation settings."""
    adapter: Path | None = None
    """With matrices that are added to the weights."""

    @property
    def own(self) -> Path:
        """The directory that the model is named after, and whose description it has."""
        return self.adapter or self.directory

    @property
    def tokenizer(self) -> Path:
        """The directory with the tokenizer: an adapter may have one of its own."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            return self.adapter
        return self.directory


def find_model(path: Path, base: str | None = None) -> ModelPlace:
    """The place of what a path names: as `find_model_directory`, or an adapter and its base.

    Args:
        path: model directory, experiment, checkpoint, or adapter directory.
        base: what an adapter was trained on; none for what it names.

    Raises:
        ModelError: there is neither a model nor an adapter, or the base of an adapter is not here.
        UsageError: a base, for a model that needs none.
    """
    adapter = adapter_at(path)
    if adapter is None:
        if base is not None:
            raise UsageError(f"--base is for adapters, and {path} is none; omit it")
        return ModelPlace(find_model_directory(path))
    return ModelPlace(_base_directory(adapter, base), adapter)


def check_models(options: object) -> None:
    """Look at the files of the models that a command's options name.

    Raises:
        ModelError: one cannot be opened.
        UsageError: --base, for a model that is no adapter.
    """
    base, draft = getattr(options, "base", None), getattr(options, "draft_model", None)
    named = [getattr(options, name, None) for name in ("model", "checkpoint")]
    whole = list(getattr(options, "models", ()))
    if not isinstance(options, AdapterArguments):
        named, whole = [], [*named, *whole]
    more = [Path(word.partition("=")[2]) for word in getattr(options, "more_models", ())]
    places = [find_model(path, base) for path in named if isinstance(path, Path)]
    places += [ModelPlace(find_model_directory(path)) for path in whole if isinstance(path, Path)]
    places += map(find_model, more)
    if (compared := getattr(options, "compare", None)) is not None:
        places.append(find_model(compared))
    drafts = [] if draft is None else [ModelPlace(find_model_directory(draft))]
    for place in (*places, *drafts):
        check_model_files(place.directory)
        check_tokenizer_files(place.tokenizer)
    answering = places if isinstance(options, AnsweringArguments) else []
    for place in (*answering, *drafts):
        check_generates(read_config(place.directory), place.directory)
    start = getattr(options, "model_path", None)
    if isinstance(start, str):
        check_start(start)


def adapter_at(path: Path) -> Path | None:
    """The adapter that a path names where no whole model is: itself, or `adapter` of an experiment."""
    directory = adapter_in(path)
    if directory is None or (path / MODEL_DIRECTORY_NAME / CONFIG_FILE_NAME).is_file():
        return None
    return None if (directory / CONFIG_FILE_NAME).is_file() else directory


def adapter_in(path: Path) -> Path | None:
    """The adapter directory for a path, whether a whole model is there too."""
    for directory in (path, path / ADAPTER_DIRECTORY_NAME):
        if (directory / ADAPTER_FILE_NAME).is_file():
            return directory
    return None


def adapter_directory(path: Path) -> Path:
    """The adapter directory for a path: itself, or `adapter` of an experiment.

    Raises:
        ModelError: there is none.
    """
    directory = adapter_in(path)
    if directory is not None:
        return directory
    raise ModelError(
        f"{path} should be an adapter directory (with {ADAPTER_FILE_NAME}) or an experiment that trained "
        f"one; found {found_at(path)}"
    )


def base_of(directory: Path) -> str:
    """The model that an adapter was trained on: a directory, or a hub name.

    Raises:
        ModelError: it names none.
    """
    name = json_of(directory / ADAPTER_FILE_NAME).get("base_model_name_or_path")
    if not name:
        raise ModelError(
            f"{directory / ADAPTER_FILE_NAME} names no base_model_name_or_path; pass --base"
        )
    return str(name)


def _base_directory(adapter: Path, base: str | None) -> Path:
    name = base or base_of(adapter)
    for path in _candidates(name):
        if adapter_at(path) is not None:
            raise ModelError(
                f"{path}, the base of the adapter {adapter}, is an adapter itself; merge it first: fst merge "
                f"{path}"
            )
        return find_model_directory(path)
    source = "--base names" if base else "it was trained on"
    raise ModelError(
        f"the adapter {adapter} needs its base: {source} {name}, which is not here; name the directory of "
        f"that model with --base, or as base_model_name_or_path in {adapter / ADAPTER_FILE_NAME}"
    )


def _candidates(name: str) -> Iterator[Path]:
    """Where the base of that name is: at a path, or imported from the hub."""
    if Path(name).exists():
        yield Path(name)
    imported = ImportModelArguments.models_root / name.rpartition("/")[2]
    if json_of(imported / DESCRIPTION_FILE_NAME).get(IMPORTED_KEY) == name:
        yield imported
