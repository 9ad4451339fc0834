"""Tokenizers of transformers for encoder models: special tokens around one text or two, a mask token.

one text   [DOC_START] text [DOC_END]        two   [DOC_START] text [DOC_END] pair [DOC_END]
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from full_stack_transformer.errors import TokenizerError
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    TrainedTokenizer,
    load_tokenizer,
)

MASK = "[MASK]"


def train_tokenizer(
    texts: Iterable[str], directory: Path, *, vocab_size: int, max_length: int
) -> None:
    """Train a byte-level BPE on texts and write it; the same texts give the same bytes."""
    trained = TrainedTokenizer.train(texts, vocab_size=vocab_size)
    save_tokenizer(trained, directory, max_length=max_length)


def save_tokenizer(
    tokenizer: DocumentTokenizer, directory: Path, *, max_length: int, can_mask: bool = False
) -> int:
    """Write a directory for `AutoTokenizer`, with special tokens around texts; returns the vocabulary size.

    Args:
        tokenizer: its begin and end tokens are put around texts.
        directory: the directory to write.
        max_length: maximum tokens of an input.
        can_mask: whether texts may contain the mask token, which is appended to the vocabulary if missing;
            other control tokens in a text are then recognised too.
    """
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    mask = MASK if can_mask else None
    if mask is not None:
        backend.add_special_tokens([AddedToken(mask, special=True, normalized=False)])
    begin, end = tokenizer.begin, tokenizer.end
    backend.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, tokenizer.begin_id), (end, tokenizer.end_id)],
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "cls_token": begin,
        "sep_token": end,
        "pad_token": tokenizer.pad,
        **({"mask_token": mask} if mask else {}),
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not can_mask,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return int(backend.get_vocab_size(with_added_tokens=True))


def copy_tokenizer(path: str, directory: Path, *, max_length: int) -> None:
    """Write the tokenizer of a directory or hub name, with special tokens around texts and a padding token.

    The begin and end tokens are used if it has no special tokens for pairs, as in causal language models.

    Raises:
        TokenizerError: there is no tokenizer.
    """
    tokenizer = open_tokenizer(path)
    if tokenizer.num_special_tokens_to_add(pair=True) < 2:
        save_tokenizer(load_tokenizer(None, path), directory, max_length=max_length)
        return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(directory)


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or hub name.

    Raises:
        TokenizerError: there is no tokenizer, or it has no offsets of tokens in their text.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerError(f"no tokenizer at {str(path)!r}: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizerError(
            f"the tokenizer at {str(path)!r} has no tokenizer.json, which is needed for the offsets of "
            "tokens; save it once with transformers' save_pretrained"
        )
    return tokenizer


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of `begin`, `end` and `pad`, for the config of a new model."""
    begin = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return {"begin": begin, "end": end, "pad": tokenizer.pad_token_id}
