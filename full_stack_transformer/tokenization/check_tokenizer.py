"""`fst check_tokenizer`: check that a tokenizer, built-in or your own, can be used for a corpus."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from full_stack_transformer.arguments.data import CheckTokenizerArguments
from full_stack_transformer.errors import TokenizerError, UsageError
from full_stack_transformer.own_classes import trust_options
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    TextStream,
    load_tokenizer,
    open_saved_tokenizer,
)
from full_stack_transformer.tokenization.encoders import (
    adversarial_texts,
    choose_encoder,
)

logger = logging.getLogger(__name__)


def main(arguments: CheckTokenizerArguments) -> None:
    """Log the properties of a tokenizer that passes all checks.

    Raises:
        TokenizerError: a check fails.
    """
    if arguments.tokenizer_cls_name is None and arguments.tokenizer_path is None:
        raise UsageError("pass --tokenizer_cls_name or --tokenizer_path")
    trust_options(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer_cls_name, arguments.tokenizer_path)
    texts = _texts(tokenizer)
    for check in CHECKS:
        problem = check(tokenizer, texts)
        if problem is not None:
            raise TokenizerError(f"{type(tokenizer).__name__}: {problem}")
    encoder = choose_encoder(tokenizer.backend, "auto", texts)
    logger.info(
        "%s passes: %s tokens, documents begin with %s and end with %s, padded with %s, encoded with %s%s",
        type(tokenizer).__name__,
        f"{tokenizer.vocab_size:,}",
        tokenizer.prefix or "nothing",
        tokenizer.end,
        tokenizer.pad,
        encoder.name,
        "" if _is_lossless(tokenizer, texts) else "; decoding does not restore every text",
    )


def _texts(tokenizer: DocumentTokenizer) -> list[str]:
    controls = [tokenizer.begin, tokenizer.end, tokenizer.pad]
    inside = [f"before {control} after {control}{control}" for control in controls]
    return [*controls, *inside, "Plain words, and a number: 42.", *adversarial_texts()]


def _frames_documents(tokenizer: DocumentTokenizer, texts: list[str]) -> str | None:
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        before = tokenizer.prefix_ids
        if ids[: len(before)] != before or ids[-1:] != [tokenizer.end_id]:
            begin = f"begin with {tokenizer.begin} and " if before else ""
            return f"a document must {begin}end with {tokenizer.end}: {text[:60]!r}"
    return None


def _keeps_control_tokens_out(tokenizer: DocumentTokenizer, texts: list[str]) -> str | None:
    control_ids = {tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id}
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        if control_ids & set(ids[len(tokenizer.prefix_ids) : -1]):
            return f"text became a control token: {text[:60]!r}"
    return None


def _stays_below_the_vocabulary(tokenizer: DocumentTokenizer, texts: list[str]) -> str | None:
    largest = max(max(ids) for ids in tokenizer.encode_documents(texts))
    if largest >= tokenizer.vocab_size:
        return f"the id {largest} is not below the vocabulary size {tokenizer.vocab_size}"
    return None


def _streams_what_it_decodes(tokenizer: DocumentTokenizer, texts: list[str]) -> str | None:
    for text in texts:
        ids = tokenizer.encode_text(text)
        stream = TextStream(tokenizer)
        if "".join(map(stream.push, ids)) + stream.finish() != tokenizer.decode(ids):
            return f"decoding token by token and decoding all differ: {text[:60]!r}"
    return None


def _survives_saving(tokenizer: DocumentTokenizer, texts: list[str]) -> str | None:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(Path(directory), model_max_length=512)
        again = open_saved_tokenizer(Path(directory))
        if again.encode_documents(texts) != tokenizer.encode_documents(texts):
            return "it encodes differently after saving and opening"
    return None


def _is_lossless(tokenizer: DocumentTokenizer, texts: list[str]) -> bool:
    return all(
        tokenizer.decode(ids)
        == f"{tokenizer.text_before}{tokenizer.normalize(text)}{tokenizer.text_after}"
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True)
    )


CHECKS: tuple[Callable[[DocumentTokenizer, list[str]], str | None], ...] = (
    _frames_documents,
    _keeps_control_tokens_out,
    _stays_below_the_vocabulary,
    _streams_what_it_decodes,
    _survives_saving,
)
