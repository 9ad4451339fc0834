"""Opens models to serve them: everything that can be wrong is found before the first request."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.errors import (
    FullStackTransformerError,
    ModelError,
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
from full_stack_transformer.serving.workers.served import AnyServed, ServedModel, ServedTask
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME
from full_stack_transformer.tasks.opening import open_task, task_class_of
from full_stack_transformer.tokenization.chat import load_chat_template

logger = logging.getLogger(__name__)

_MAX_TRIES_TO_OPEN = 5


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


def open_served(name: str | None, path: Path, options: OpeningOptions) -> AnyServed:
    """Open a model and check that its parts agree; one that generates makes a token.

    Raises:
        ModelError: it cannot be opened, or its parts do not agree.
    """
    for _ in range(_MAX_TRIES_TO_OPEN):
        before = signature_of(path, options)
        served = _open_any(name, path, options, before)
        # Training may have replaced the directory between two of its files.
        if signature_of(path, options) == before:
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


def signature_of(path: Path, options: OpeningOptions) -> object:
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
