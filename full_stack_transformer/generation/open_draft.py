"""Opens a draft model, which must speak the vocabulary of the model that it guesses for."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.errors import ModelError
from full_stack_transformer.generation.runners.native.decoder import WeightsDtype
from full_stack_transformer.modelling.backbones import num_parameters
from full_stack_transformer.modelling.model_directory import OpenedModel, open_model
from full_stack_transformer.modelling.model_files import find_model_directory
from full_stack_transformer.modelling.places import adapter_at
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DraftSource:
    """A draft model that is to be opened."""

    path: Path
    """Model directory, experiment directory or .ckpt file."""
    weights_dtype: Literal["auto"] | WeightsDtype = "auto"
    """auto is int8 in the C++ decoder: a guess need not be exact. Else that of the model."""


@dataclass(frozen=True)
class OpenedDraft:
    """A draft model, in evaluation mode."""

    model: OpenedModel
    weights_dtype: Literal["auto"] | WeightsDtype


def open_draft(source: DraftSource, model: OpenedModel, path: Path, *, device: str) -> OpenedDraft:
    """Open a draft for a model that was opened from a path; of the same one the weights are read once.

    Raises:
        ModelError: there is no draft model, it cannot continue texts, or it has another vocabulary.
    """
    directory = find_model_directory(source.path)
    is_whole = source.path.suffix != ".ckpt" and adapter_at(path) is None
    if is_whole and directory.samefile(find_model_directory(path)):
        return OpenedDraft(model, source.weights_dtype)
    draft = open_model(source.path, device=device)
    problem = _why_not(draft.tokenizer, model.tokenizer)
    if problem is not None:
        raise ModelError(
            f"--draft_model {source.path} has another vocabulary than the model: {problem}; a draft needs "
            "the tokenizer of the model, such as a smaller model of the same family"
        )
    sizes = num_parameters(draft.backbone), num_parameters(model.backbone)
    if sizes[0] > sizes[1]:
        logger.warning(
            "--draft_model %s has %s parameters, the model %s: a draft should be much smaller",
            *(source.path, f"{sizes[0]:,}", f"{sizes[1]:,}"),
        )
    return OpenedDraft(draft, source.weights_dtype)


def _why_not(draft: DocumentTokenizer, model: DocumentTokenizer) -> str | None:
    """What differs between two vocabularies; none if they are the same."""
    theirs, ours = (
        tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (draft, model)
    )
    if theirs == ours:
        return None
    differing = {
        token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)
    }
    token = min(differing, key=lambda one: (ours.get(one, len(ours)), one))
    ids = (
        "no token" if vocabulary.get(token) is None else f"id {vocabulary[token]:,}"
        for vocabulary in (theirs, ours)
    )
    return "{:,} of its {:,} tokens differ, {!r} is {} there and {} in the model".format(
        len(differing), len(theirs), token, *ids
    )
