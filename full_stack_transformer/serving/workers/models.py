"""The models that are served, by name; `--watch` replaces one between requests.

A request keeps the model it began with, so a replaced one lives until its last request has ended.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.sampling import NUMERIC, SamplingParameters
from full_stack_transformer.errors import (
    FullStackTransformerError,
    ModelError,
    RequestError,
    UnknownModelError,
)
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.open_draft import DraftSource, open_draft
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.requests import Conventions
from full_stack_transformer.generation.runners.native.decoder import KvDtype, WeightsDtype
from full_stack_transformer.generation.token_requests import TokenRequest
from full_stack_transformer.modelling.adapters import ADAPTER_WEIGHTS_NAME
from full_stack_transformer.modelling.backbones import outline_of
from full_stack_transformer.modelling.model_directory import OpenedModel, name_of_model, open_model
from full_stack_transformer.modelling.places import ModelPlace, find_model
from full_stack_transformer.serving.schemas import ServedModelFacts
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME
from full_stack_transformer.tasks.opening import OpenedTask, open_task, task_class_of
from full_stack_transformer.tasks.routes import Route
from full_stack_transformer.tasks.task import RowTask
from full_stack_transformer.tokenization.chat import load_chat_template
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 2.0
_MAX_TRIES_TO_OPEN = 5
# Sampling parameters that every model has a value of.
_SHOWN = tuple(name for name in NUMERIC if name != "seed")


@dataclass(frozen=True)
class OpeningOptions:
    """How every model is opened."""

    device: str
    num_slots: int
    weights_dtype: Literal["auto"] | WeightsDtype
    max_length: int | None
    kv_dtype: Literal["auto"] | KvDtype = "auto"
    kv_memory: int | None = None
    """Bytes for keys and values of all models; none for a share of what is free."""
    memory_share: float = 1.0
    """Of that, for each model."""
    drafts: Mapping[Path, DraftSource] = field(default_factory=dict)
    """Draft models, by the paths of the models that they guess for."""
    bases: Mapping[Path, str | None] = field(default_factory=dict)
    """What adapters were trained on, by their paths; else what they name."""

    def place_of(self, path: Path) -> ModelPlace:
        """The directories of a model.

        Raises:
            ModelError: there is none.
        """
        return find_model(path, self.bases.get(path))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Served:
    """A model that is served, whatever its task."""

    name: str
    path: Path
    """What was opened."""
    signature: object
    """Tells one content of the directory from the next."""
    description: dict[str, Any]
    """That of the model directory."""
    loaded_at: int = field(default_factory=lambda: int(time.time()))
    num_swaps: int = 0

    @property
    def parent(self) -> str | None:
        """The model that an adapter stands beside."""
        return None

    def _facts(self, **others: Any) -> ServedModelFacts:
        """What `/version` says of it; `others` are the fields that depend on its kind."""
        description = self.description
        return ServedModelFacts(
            model=self.name,
            parent=self.parent,
            checkpoint=self.path.name,
            step=_number(description.get("step"), int),
            validation_loss=_number(description.get("validation_loss"), float),
            num_swaps=self.num_swaps,
            loaded_at=self.loaded_at,
            description=description,
            **others,
        )


def _shown_memory(engine: Engine) -> dict[str, int | str] | None:
    """What the keys and values of an engine's texts take."""
    memory = engine.memory
    if memory is None:
        return None
    return {
        "dtype": memory.dtype,
        "num_blocks": memory.num_blocks,
        "block_size": memory.block_size,
        "num_tokens": memory.num_tokens,
        "num_bytes": memory.num_bytes,
        "num_texts_of_full_length": memory.num_tokens // engine.max_length,
    }


def _shown_draft(engine: Engine) -> dict[str, str | bool] | None:
    """What guesses for an engine."""
    draft = None if engine.guesses is None else engine.guesses.draft
    if draft is None:
        return None
    return {"model": draft.name, "computed_by": draft.computed_by, "is_broken": draft.is_broken}


def _number(value: object, kind: type) -> Any:
    return value if isinstance(value, (int, kind)) and not isinstance(value, bool) else None


@dataclass(eq=False)
class ServedAdapter:
    """What makes a model of a base."""

    parent: str
    """Name of the base."""
    number: int = 0
    """That of the base's engine."""
    is_unloaded: bool = False
    """Whether new requests are refused."""
    refused: object = None
    """Signature of a content of its directory that could not be served."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ServedModel(_Served):
    """One model, ready to generate; with an adapter on the engine of its base."""

    engine: Engine
    conventions: Conventions
    outline: Backbone
    """The layers of the base, without weights, for adapters to be compared with."""
    adapter: ServedAdapter | None = None

    @property
    def parent(self) -> str | None:
        """The model that an adapter stands beside."""
        return None if self.adapter is None else self.adapter.parent

    @property
    def adapter_number(self) -> int:
        """What the engine knows the adapter by; 0 for the base.

        Raises:
            UnknownModelError: it has been unloaded since it was found.
        """
        if self.adapter is None:
            return 0
        if self.adapter.is_unloaded:
            raise UnknownModelError("this adapter has just been unloaded")
        return self.adapter.number

    @property
    def tokenizer(self) -> DocumentTokenizer:
        """That of the model."""
        return self.conventions.tokenizer

    @property
    def facts(self) -> ServedModelFacts:
        """What people may know of it."""
        return self._facts(
            context_tokens=self.engine.max_length,
            computed_by=self.engine.computed_by,
            key_value_memory=_shown_memory(self.engine),
            draft_model=_shown_draft(self.engine),
            has_chat_template=not self.conventions.template.is_plain,
            control_tokens=self.tokenizer.control_tokens,
            sampling=_shown_sampling(self.conventions.defaults),
            chat_sampling=_shown_sampling(self.conventions.chat_defaults),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ServedTask(_Served):
    """One model, ready to predict."""

    opened: OpenedTask

    @property
    def task(self) -> RowTask:
        """What it does."""
        return self.opened.row_task

    @property
    def makes_vectors(self) -> bool:
        """Whether its predictions are vectors of texts."""
        return any(route.needs_vectors for route in self.task.routes)

    @property
    def facts(self) -> ServedModelFacts:
        """What people may know of it."""
        task = self.task
        weights = next(self.opened.backbone.parameters())
        return self._facts(
            task=task.name,
            context_tokens=task.options.max_length,
            computed_by=f"PyTorch, {str(weights.dtype).removeprefix('torch.')} on {weights.device}",
            control_tokens=task.control_tokens,
            form=_shown(task),
        )


def _shown_sampling(parameters: SamplingParameters) -> dict[str, float]:
    return {name: getattr(parameters, name) for name in _SHOWN}


def _shown(task: RowTask) -> dict[str, Any]:
    """The form of the task, whose hint names the mask of this model."""
    if task.form is None:
        return {}
    form = asdict(task.form)
    if task.control_tokens:
        form["hint"] = form["hint"].replace("MASK", task.control_tokens[0])
    return form


AnyServed = ServedModel | ServedTask


class ServedModels:
    """Models by name, at least one; the first is the default."""

    def __init__(self, models: Sequence[AnyServed], options: OpeningOptions) -> None:
        self._models: dict[str, AnyServed] = {model.name: model for model in models}
        self._options = options
        if len(self._models) < len(models):
            names = ", ".join(model.name for model in models)
            raise ModelError(f"every model needs a name of its own, found {names}; use NAME=PATH")

    @property
    def first(self) -> AnyServed:
        """The first of the command line."""
        return next(iter(self._models.values()))

    @property
    def all(self) -> list[AnyServed]:
        """Every model, in the order of the command line."""
        return list(self._models.values())

    @property
    def generating(self) -> list[ServedModel]:
        """Those that continue texts."""
        return [model for model in self.all if isinstance(model, ServedModel)]

    @property
    def bases(self) -> list[ServedModel]:
        """Those of them that are no adapters: one for each engine."""
        return [model for model in self.generating if model.adapter is None]

    @property
    def adapters(self) -> list[ServedModel]:
        """Adapters beside them."""
        return [model for model in self.generating if model.adapter is not None]

    @property
    def of_tasks(self) -> list[ServedTask]:
        """Those of other tasks."""
        return [model for model in self.all if isinstance(model, ServedTask)]

    def find(self, name: str | None) -> ServedModel:
        """The generating model of that name; the first one without a name.

        Raises:
            UnknownModelError: no model has this name.
            RequestError: it is for another task.
        """
        found = next(iter(self.generating), self.first) if name is None else self.find_any(name)
        if isinstance(found, ServedTask):
            raise RequestError(
                f"{found.name} is a model for {found.task.name}, it does not generate text; /docs "
                "lists the routes"
            )
        return found

    def find_task(self, name: str | None, route: Route, task: str) -> ServedTask:
        """The model of that name whose task has a route; the first one of them without a name.

        Args:
            name: of the model.
            route: what is asked.
            task: the task that the route belongs to, for the error.

        Raises:
            UnknownModelError: no model has this name.
            RequestError: it is for another task.
        """
        those = [model for model in self.of_tasks if route in model.task.routes]
        found = next(iter(those), self.first) if name is None else self.find_any(name)
        if isinstance(found, ServedModel) or route not in found.task.routes:
            raise RequestError(
                f"{found.name} is a model for {found.facts.task}; this route needs one for {task}"
            )
        return found

    def find_any(self, name: str | None) -> AnyServed:
        """The model of that name; the first one without a name.

        Raises:
            UnknownModelError: no model has this name.
        """
        if name is None:
            return self.first
        found = self._models.get(name)
        if found is None:
            raise UnknownModelError(
                f"no model of this name is served; there are: {', '.join(self._models)[:300]}"
            )
        return found

    def add(self, model: ServedModel) -> None:
        """Serve one more, or another one of the same name."""
        self._models[model.name] = model

    def remove(self, name: str) -> None:
        """Serve it no longer."""
        del self._models[name]

    async def watch(self, follow: Callable[[], Awaitable[None]]) -> None:
        """Replace models whose directory has changed, until cancelled.

        Args:
            follow: called after each look, for adapters.
        """
        failed: dict[str, object] = {}
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            for model in (*self.bases, *self.of_tasks):
                signature = _signature(model.path, self._options)
                if signature in (model.signature, None) or failed.get(model.name) == signature:
                    continue
                try:
                    new = await asyncio.to_thread(
                        open_served, model.name, model.path, self._options
                    )
                except (
                    Exception
                ) as error:  # the old model goes on, whatever is wrong with the new one
                    failed[model.name] = signature
                    logger.warning("the new model at %s cannot be served: %s", model.path, error)
                    continue
                self._models[model.name] = new = _as_successor(new, model.num_swaps + 1)
                logger.info("now serving %s at step %s", new.name, new.facts.step)
            await follow()


def _as_successor(model: AnyServed, num_swaps: int) -> AnyServed:
    return dataclasses.replace(model, num_swaps=num_swaps)


def open_served(name: str | None, path: Path, options: OpeningOptions) -> AnyServed:
    """Open a model and check that its parts agree; one that generates makes a token.

    Raises:
        ModelError: it cannot be opened, or its parts do not agree.
    """
    for _ in range(_MAX_TRIES_TO_OPEN):
        before = _signature(path, options)
        served = _open_any(name, path, options, before)
        # Training may have replaced the directory between two of its files.
        if _signature(path, options) == before:
            return served
    raise ModelError(f"{path} changes faster than it can be opened; try again later")


def _open_any(
    name: str | None, path: Path, options: OpeningOptions, signature: object
) -> AnyServed:
    place = options.place_of(path)
    if task_class_of(place.directory, place.adapter).generates:
        return _open_once(name, path, options, signature)
    return _open_task(name, path, options, signature)


def _open_task(
    name: str | None, path: Path, options: OpeningOptions, signature: object
) -> ServedTask:
    """Open a model of another task than generating.

    Raises:
        ModelError: it cannot be opened, or not with weights of this type.
    """
    if path in options.drafts:
        raise ModelError(f"{path}: --draft_model is for models that generate; omit it")
    if options.weights_dtype in ("int8", "int4"):
        raise ModelError(
            f"{path}: {options.weights_dtype} is for models that generate; pass --weights_dtype auto"
        )
    dtype = torch.bfloat16 if options.weights_dtype == "bfloat16" else torch.float32
    opened = open_task(path, base=options.bases.get(path), device=options.device, dtype=dtype)
    _ = opened.row_task  # a model without rows is refused now, not by its first request
    return ServedTask(
        name=name or name_of_model(options.place_of(path).own),
        path=path,
        signature=signature,
        description=opened.description,
        opened=opened,
    )


def _open_once(
    name: str | None, path: Path, options: OpeningOptions, signature: object
) -> ServedModel:
    opened = open_model(
        path,
        base=options.bases.get(path),
        device=options.device,
        weights_dtype=options.weights_dtype,
    )
    source = options.drafts.get(path)
    engine = open_engine(
        opened.backbone,
        num_slots=options.num_slots,
        weights_dtype=options.weights_dtype,
        max_length=options.max_length,
        kv_dtype=options.kv_dtype,
        kv_memory=options.kv_memory,
        memory_share=options.memory_share,
        draft=None if source is None else open_draft(source, opened, path, device=options.device),
    )
    template = load_chat_template(options.place_of(path).tokenizer)
    _check_end_ids(opened, path)
    _make_one_token(opened, engine, path)
    return ServedModel(
        name=name or opened.name,
        path=path,
        signature=signature,
        description=opened.description,
        engine=engine,
        conventions=Conventions.of(opened, template),
        outline=outline_of(opened.backbone),
    )


def _check_end_ids(opened: OpenedModel, path: Path) -> None:
    """Compare what the generation settings name as the end of a text with tokenizer and weights.

    Raises:
        ModelError: the settings name ids that the model does not have.
    """
    tokenizer = opened.tokenizer
    num_embeddings = opened.backbone.get_input_embeddings().num_embeddings
    settings: Any = opened.backbone.generation_config
    named = getattr(settings, "eos_token_id", None)
    ids = frozenset([named] if isinstance(named, int) else named or ())
    wrong = sorted(one for one in ids if not 0 <= one < num_embeddings)
    if wrong:
        raise ModelError(
            f"{path}: generation_config.json names the end tokens {wrong[:5]}, the model has "
            f"{num_embeddings:,} embeddings; they do not belong together"
        )
    if ids and tokenizer.end_id not in ids:
        logger.warning(
            "%s: the tokenizer ends a text with %d, generation_config.json with %s; both end a text here",
            *(path, tokenizer.end_id, sorted(ids)),
        )


def _make_one_token(opened: OpenedModel, engine: Engine, path: Path) -> None:
    """What is broken is better known before the first request; and this warms up what is slow once."""
    prompt = opened.tokenizer.encode_prompt("A")[: engine.max_length - 1]
    engine.add(TokenRequest(prompt, SamplingParameters(max_new_tokens=1, temperature=0)))
    while engine.num_running:
        for event in engine.step():
            if event.problem is not None:
                raise ModelError(f"{path} cannot be served, its first text failed: {event.problem}")


def _signature(path: Path, options: OpeningOptions) -> object:
    """Changes whenever a model directory is replaced; none while there is no model."""
    try:
        directory = options.place_of(path).own
        stats = [directory.stat()]
        description = directory / DESCRIPTION_FILE_NAME
        stats += [description.stat()] if description.is_file() else []
        stats += [path.stat()] if path.is_file() else []
    except (OSError, FullStackTransformerError):
        return None
    return tuple((one.st_ino, one.st_mtime_ns) for one in stats)


def signature_of_adapter(directory: Path) -> object:
    """The same of an adapter directory."""
    try:
        stats = [one.stat() for one in (directory, directory / ADAPTER_WEIGHTS_NAME)]
    except OSError:
        return None
    return tuple((one.st_ino, one.st_mtime_ns) for one in stats)
