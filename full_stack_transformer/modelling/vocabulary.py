"""A model for other tokens: embeddings of equal tokens are carried over, others start at the mean."""

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

logger = logging.getLogger(__name__)

_BROKEN = "\ufffd"


def exchange_vocabulary(
    backbone: Backbone, old: DocumentTokenizer, new: DocumentTokenizer
) -> Backbone:
    """The same model for the tokens of `new`, changed in place.

    The tokens that begin and end a document, and padding, take the place of those of `old`.
    """
    places = _places(old, new)
    rows = torch.tensor([-1 if place is None else place for place in places])
    parts = [backbone.get_input_embeddings(), backbone.get_output_embeddings()]
    old_values = [_values(part) for part in parts]
    backbone.resize_token_embeddings(new.vocab_size, mean_resizing=False)
    for part, before in zip(
        (backbone.get_input_embeddings(), backbone.get_output_embeddings()), old_values, strict=True
    ):
        for name, value in before.items():
            getattr(part, name).data.copy_(_carried_over(value[: old.vocab_size], rows))
    config = backbone.config
    config.bos_token_id, config.eos_token_id = new.begin_id, new.end_id
    config.pad_token_id = new.pad_id
    num_known = int((rows >= 0).sum())
    logger.info(
        "--resize_embeddings new: %s of the dataset's %s tokens are tokens of the model and keep their "
        "embeddings; %s start at the mean, and %s tokens of the model are gone",
        f"{num_known:,}",
        f"{new.vocab_size:,}",
        f"{new.vocab_size - num_known:,}",
        f"{old.vocab_size - len({place for place in places if place is not None}):,}",
    )
    return backbone


def _values(part: nn.Module | None) -> dict[str, Tensor]:
    """Weights, and the bias of an output layer that has one."""
    if part is None:
        return {}
    return {name: value.detach().clone() for name, value in part.named_parameters(recurse=False)}


def _carried_over(values: Tensor, rows: Tensor) -> Tensor:
    """The values (tokens, …) in their new order; the mean where the row is -1."""
    carried = values[rows.clamp(min=0)]
    carried[rows < 0] = values.mean(dim=0)
    return carried


def _places(old: DocumentTokenizer, new: DocumentTokenizer) -> list[int | None]:
    """For each id of `new` the id of `old` that means the same."""
    known: dict[str, int] = {}
    for index, text in enumerate(_texts(old)):
        known.setdefault(text, index)
    places = [known.get(text) if text else None for text in _texts(new)]
    for ours, theirs in (
        (new.pad_id, old.pad_id),
        (new.begin_id, old.begin_id),
        (new.end_id, old.end_id),
    ):
        if places[ours] is None:
            places[ours] = theirs
    return places


def _texts(tokenizer: DocumentTokenizer) -> list[str]:
    """What each id stands for in the middle of a text, however its tokenizer writes it; "" for no token."""
    before = tokenizer.encode_text("a")
    start = len(tokenizer.decode(before))
    texts: list[str] = []
    for token_id in range(tokenizer.vocab_size):
        name = tokenizer.backend.id_to_token(token_id) or ""
        text = "" if tokenizer.leaves_out(token_id) else tokenizer.decode([*before, token_id])
        # Part of a character, or a control token: only a token of the same name means the same.
        is_text = len(text) > start and _BROKEN not in text
        texts.append(f"text {text[start:]}" if is_text else name and f"name {name}")
    return texts
