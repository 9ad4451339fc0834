"""Adapters that are served beside their bases, each a model of its own: loaded and unloaded while texts run.

    name, directory ──read, checked in another thread──> engine thread, between two steps ──> models by name

A request keeps the adapter it began with: one that is unloaded, or replaced, lives until its last request has
ended. Knows nothing of HTTP.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from full_stack_transformer.errors import (
    InputError,
    MachineError,
    ModelError,
    RequestError,
    ServiceUnavailableError,
    UnknownModelError,
)
from full_stack_transformer.generation.requests import Conventions
from full_stack_transformer.modelling.adapter_weights import AdapterWeights, read_adapter
from full_stack_transformer.modelling.model_directory import OpenedModel
from full_stack_transformer.modelling.other_files import ADAPTER_FILE_NAME, json_of
from full_stack_transformer.modelling.places import (
    IMPORTED_KEY,
    adapter_directory,
    adapter_in,
    find_model,
)
from full_stack_transformer.serving.workers.engine_worker import EngineWorker
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.opening import signature_of_adapter
from full_stack_transformer.serving.workers.served import ServedAdapter, ServedModel
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME
from full_stack_transformer.tokenization.chat import load_chat_template
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_FILE_NAME = "tokenizer.json"


def open_adapters(words: Sequence[str], models: ServedModels, *, most: int) -> None:
    """Add the adapters of `NAME=PATH` and `BASE:NAME=PATH` words to the models; for the start.

    Raises:
        ModelError: one cannot be served.
        MachineError: memory is short.
    """
    if len(words) > most:
        raise ModelError(f"--adapters names {len(words)}, and --max_adapters is {most}; raise it")
    for word in words:
        name, _, path = word.partition("=")
        base_name = next(
            (one.name for one in models.bases if name.startswith(f"{one.name}:")), None
        )
        if base_name is not None:
            name = name.removeprefix(f"{base_name}:")
        directory = adapter_directory(Path(path))
        if any(one.name == name for one in models.all):
            raise ModelError(f"--adapters {word}: a model {name} is served; choose another name")
        base = base_for(models, directory, base_name)
        weights, model = _read(name, directory, base)
        models.add(_numbered(model, base.engine.add_adapter(weights)))


def base_for(models: ServedModels, directory: Path, name: str | None = None) -> ServedModel:
    """The model that an adapter stands beside: of this name, the only one, or the one that it was trained on.

    Raises:
        ModelError: there is none, or it is not clear which.
    """
    bases = models.bases
    there = ", ".join(one.name for one in bases)[:300]
    if name is not None:
        named = [one for one in bases if one.name == name]
        if not named:
            raise ModelError(f"no model {name} is served that could be a base; there are: {there}")
        return named[0]
    wanted = str(json_of(directory / ADAPTER_FILE_NAME).get("base_model_name_or_path"))
    those = [one for one in bases if _is_of(one, wanted)]
    if len(bases) == 1:
        if not those:
            logger.warning(
                "the adapter %s was trained on %s, and stands beside %s", directory, wanted, there
            )
        return bases[0]
    if len(those) != 1:
        found = "several of them are" if those else "none of them is"
        raise ModelError(
            f"the adapter {directory} was trained on {wanted}, and {found} served (there are: {there}); name "
            "its base: --adapters BASE:NAME=PATH, or base_model_name in the body"
        )
    return those[0]


def _is_of(model: ServedModel, wanted: str) -> bool:
    """Whether a model is what an adapter names as its base."""
    if wanted in (model.name, model.description.get(IMPORTED_KEY)):
        return True
    place, path = find_model(model.path), Path(wanted)
    return place.adapter is None and path.is_dir() and path.samefile(place.directory)


def _read(name: str, directory: Path, base: ServedModel) -> tuple[AdapterWeights, ServedModel]:
    """Check everything that can be wrong, without touching what runs.

    Raises:
        ModelError: it cannot stand beside this base.
        MachineError: memory is short.
    """
    signature = signature_of_adapter(directory)
    conventions = _conventions(directory, base)
    weights = read_adapter(directory, base.outline)
    return weights, ServedModel(
        name=name,
        path=directory,
        signature=signature,
        description=json_of(directory / DESCRIPTION_FILE_NAME),
        engine=base.engine,
        conventions=conventions,
        outline=base.outline,
        adapter=ServedAdapter(base.name),
    )


def _numbered(model: ServedModel, number: int) -> ServedModel:
    assert model.adapter is not None
    model.adapter.number = number
    return model


def _conventions(directory: Path, base: ServedModel) -> Conventions:
    """The adapter's own chat template where it has one; the tokenizer is the base's.

    Raises:
        ModelError: its tokenizer has another vocabulary.
    """
    if not (directory / "tokenizer_config.json").is_file():
        return base.conventions
    file = directory / _TOKENIZER_FILE_NAME
    theirs = find_model(base.path).tokenizer / _TOKENIZER_FILE_NAME
    is_same = theirs.is_file() and file.is_file() and file.read_bytes() == theirs.read_bytes()
    if not is_same:
        found, expected = (
            one.backend.get_vocab(with_added_tokens=True)
            for one in (open_saved_tokenizer(directory), base.tokenizer)
        )
        if found != expected:
            raise ModelError(
                f"the adapter {directory} has a tokenizer of {len(found):,} tokens, which are not the "
                f"{len(expected):,} of {base.name}: it was trained on another model, or with new tokens; "
                f"merge it with its base and serve the result: fst merge {directory}"
            )
    template = load_chat_template(directory)
    if template.is_plain or template == base.conventions.template:
        return base.conventions
    opened = OpenedModel(base.name, base.outline, base.tokenizer, {})
    return Conventions.of(opened, template)


class Adapters:
    """Loads and unloads adapters of running models; used on the event loop.

    Args:
        models: to which they belong.
        worker: that owns the engines.
        root: what is loaded lies below this directory; none loads nothing.
        most: adapters at once.
    """

    def __init__(
        self, models: ServedModels, worker: EngineWorker, *, root: Path | None, most: int
    ) -> None:
        self._models = models
        self._worker = worker
        self._root = None if root is None else root.resolve()
        self._most = most
        # One at a time: each takes memory while it is checked.
        self._turn = asyncio.Lock()

    async def load(
        self, name: str, path: str, *, base_name: str | None = None, replaces: bool = False
    ) -> None:
        """Serve the adapter at a path under a name.

        Args:
            name: of the new model.
            path: of its directory, below the root.
            base_name: of its base; none for the only model, or the one that it was trained on.
            replaces: an adapter of this name, if there is one.

        Raises:
            UnknownModelError: there is no adapter at the path.
            RequestError: it lies elsewhere, cannot be served, or the name is taken.
            ServiceUnavailableError: memory is short, or the service is stopping.
        """
        if self._root is None:
            raise RequestError(
                "this service loads no adapters; the operator allows it with --adapters_root DIRECTORY"
            )
        async with self._turn:
            before = self._check_name(name, replaces=replaces)
            directory = await asyncio.to_thread(self._find, path)
            try:
                base = await asyncio.to_thread(base_for, self._models, directory, base_name)
                await self._serve(name, directory, base)
            except (InputError, MachineError, OSError) as error:
                # Clients know the path that they sent, not where it lies.
                said = str(error).replace(str(directory), "lora_path")
                kind = ServiceUnavailableError if isinstance(error, MachineError) else RequestError
                raise kind(said) from error
            if before is not None:
                self._retire(before)
        logger.info("serving the adapter %s beside %s", name, base.name)

    async def unload(self, name: str) -> None:
        """Take no new requests for an adapter; those under way end as they would have.

        Raises:
            UnknownModelError: there is no adapter of this name.
        """
        async with self._turn:
            self._retire(self._find_adapter(name))
            self._models.remove(name)
        logger.info("unloaded the adapter %s", name)

    async def follow(self) -> None:
        """Load those again whose directory has changed, or whose base has been replaced.

        What cannot be served now is unloaded where its base was replaced, else it stays as it was.
        """
        for name in [one.name for one in self._models.adapters]:
            async with self._turn:
                await self._follow(name)

    async def _follow(self, name: str) -> None:
        model = next((one for one in self._models.adapters if one.name == name), None)
        if model is None or model.adapter is None:  # unloaded meanwhile
            return
        base = next((one for one in self._models.bases if one.name == model.parent), None)
        if base is None:
            logger.warning("the adapter %s is unloaded: its base generates no texts now", name)
            self._models.remove(name)
            return
        signature = signature_of_adapter(model.path)
        is_stale = base.engine is not model.engine
        if not is_stale and signature in (model.signature, model.adapter.refused, None):
            return
        try:
            if self._root is not None and model.path.is_relative_to(self._root):
                await asyncio.to_thread(self._check_files, model.path)
            await self._serve(name, model.path, base, num_swaps=model.num_swaps + 1)
        except Exception as error:  # the old one goes on, whatever is wrong with the new one
            logger.warning("the adapter %s cannot be served: %s", name, error)
            model.adapter.refused = signature
            if is_stale:
                self._models.remove(name)
        else:
            logger.info("now serving the adapter %s as it is in its directory", name)
            self._retire(model)

    async def _serve(
        self, name: str, directory: Path, base: ServedModel, *, num_swaps: int = 0
    ) -> None:
        weights, model = await asyncio.to_thread(_read, name, directory, base)
        add: Callable[[], int] = partial(base.engine.add_adapter, weights)
        number = await self._worker.between_steps(add)
        self._models.add(dataclasses.replace(_numbered(model, number), num_swaps=num_swaps))

    def _check_name(self, name: str, *, replaces: bool) -> ServedModel | None:
        """The adapter that is replaced.

        Raises:
            RequestError: the name is taken, or there are as many as may be.
        """
        adapters = {one.name: one for one in self._models.adapters}
        if name in adapters:
            if replaces:
                return adapters[name]
            raise RequestError(
                "lora_name: an adapter of this name is loaded; unload it, or replace it with load_inplace"
            )
        if any(one.name == name for one in self._models.all):
            raise RequestError("lora_name: a model of this name is served; choose another")
        if len(adapters) >= self._most:
            raise RequestError(
                f"{self._most} adapters are loaded, which is the most that --max_adapters allows; unload one"
            )
        return None

    def _find(self, path: str) -> Path:
        """The adapter directory at a path below the root, links followed.

        Raises:
            RequestError: it lies elsewhere.
            UnknownModelError: there is none.
        """
        try:
            return self._find_below(path)
        except (OSError, ValueError, RuntimeError):  # no permission, a loop of links, a null byte
            raise RequestError(
                "lora_path: cannot be read below the directory that --adapters_root names"
            ) from None

    def _find_below(self, path: str) -> Path:
        assert self._root is not None
        found = (self._root / path).resolve()
        if not found.is_relative_to(self._root):
            raise RequestError("lora_path: must lie below the directory that --adapters_root names")
        directory = adapter_in(found)
        if directory is None:
            raise UnknownModelError(
                f"lora_path: there is no adapter directory (with {ADAPTER_FILE_NAME}) of this name below the "
                "directory that --adapters_root names"
            )
        self._check_files(directory)
        return directory

    def _check_files(self, directory: Path) -> None:
        """Refuse what lies elsewhere or is no file; templates lie in a directory below the adapter's."""
        assert self._root is not None
        for file in directory.rglob("*"):
            if not file.resolve().is_relative_to(self._root):
                raise RequestError(
                    "lora_path: has a link to a file outside the directory that --adapters_root names"
                )
            if file.is_symlink() and file.is_dir():
                raise RequestError("lora_path: has a link to a directory")
            if not (file.is_file() or file.is_dir()):  # a pipe would keep its reader forever
                raise RequestError("lora_path: holds something that is neither file nor directory")

    def _find_adapter(self, name: str) -> ServedModel:
        found = next((one for one in self._models.adapters if one.name == name), None)
        if found is None:
            raise UnknownModelError("lora_name: no adapter of this name is loaded")
        return found

    def _retire(self, model: ServedModel) -> None:
        assert model.adapter is not None and not model.adapter.is_unloaded
        model.adapter.is_unloaded = True
        self._worker.retire(model.engine, model.adapter.number)
