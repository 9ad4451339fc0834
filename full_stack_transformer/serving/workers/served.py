"""One model that is served, of either kind, and what people may know of it."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.sampling import NUMERIC, SamplingParameters
from full_stack_transformer.errors import (
    UnknownModelError,
)
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.requests import Conventions
from full_stack_transformer.serving.schemas import ServedModelFacts
from full_stack_transformer.tasks.opening import OpenedTask
from full_stack_transformer.tasks.task import RowTask
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

# Sampling parameters that every model has a value of.
_SHOWN = tuple(name for name in NUMERIC if name != "seed")


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
