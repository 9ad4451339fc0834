"""Texts -> token ids in arrays: the reference, and a faster back end that is checked to give the same ids.

`tokenizers` is the reference and fits every tokenizer. `gigatoken` is 20 to 80 times faster on byte-level
BPE. The two differ only where their Unicode tables do, so a text with a character on which tables of
different years may differ goes to the reference (`_is_doubtful`). Knows nothing of documents and files.
"""

import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from full_stack_transformer.errors import MissingExtraError, TokenizerError, install_command
from full_stack_transformer.machine import resident_bytes

logger = logging.getLogger(__name__)

BackendName = Literal["tokenizers", "gigatoken"]

# gigatoken 0.10 caches every word: 400 MB of unique words took 3.1 GB. It is loaded again when the process
# has grown by this much. The first 100 MB of ordinary text stay below; with half of the limit they needed a
# second loading and filled the cache twice, 0.4 of 1.8 processor seconds.
_MAX_CACHE_BYTES = 80 << 20
_LAST_OF_PLANE = 0xFFFF
# Where a match of GPT-2's pattern always ends, so that a byte-level BPE gives both sides the ids that they
# have in the whole text: white space after anything else, and a mark after a Chinese or Japanese character;
# only characters of which all Unicode versions say the same.
_CJK = "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5"
_BORDER = re.compile(rf"[!-~{_CJK}](?=[ \t\n\r])|[{_CJK}](?=[\u3001\u3002\uff01\uff0c\uff1f])")
_NEAR_CHARACTERS = 1 << 12
# A part without a border is cut anywhere: encoding takes some 200 times its size in memory.
MAX_WORD_CHARACTERS = 1 << 22
# If the growth cannot be read, loaded again after so many characters, which fit even if every word is new.
_MAX_CACHE_CHARACTERS = 6 << 20


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of texts, concatenated."""

    token_ids: NDArray[np.unsignedinteger]
    """(tokens,)"""
    offsets: NDArray[np.int64]
    """(texts + 1,): text i has the ids from offsets[i] to offsets[i + 1]."""


class Encoder(Protocol):
    """Encodes texts; several threads may share it."""

    name: BackendName

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Token ids without framing; text never becomes a control token."""
        ...


class ReferenceEncoder:
    """Encodes with `tokenizers`."""

    name: BackendName = "tokenizers"

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Token ids, with all cores at once.

        Raises:
            TokenizerError: the tokenizer has no token for a text, and none for unknown ones.
        """
        with explained_failures():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(text_ids) for text_ids in ids], out=offsets[1:])
        return EncodedTexts(np.concatenate(ids) if ids else np.zeros(0, np.uint32), offsets)


@contextmanager
def explained_failures() -> Iterator[None]:
    """Around encoding: turns the bare exceptions of tokenizers into a TokenizerError."""
    try:
        yield
    except Exception as error:
        raise TokenizerError(
            f"the tokenizer cannot encode a text ({error}); if it has no token for unknown text, add one: "
            "unk_token of the model in tokenizer.json, or unk_id for Unigram"
        ) from error


class GigatokenEncoder:
    """Encodes with `gigatoken`, and with the reference where the two might differ."""

    name: BackendName = "gigatoken"

    def __init__(self, backend: Tokenizer) -> None:
        self._reference = ReferenceEncoder(backend)
        self._json = _without_control_tokens(backend)
        self._gigatoken: Any = None
        self._lock = Lock()
        self._load()

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Token ids, on the calling thread only."""
        is_doubtful = [not text.isascii() and has_doubtful_character(text) for text in texts]
        sure = [text for text, doubtful in zip(texts, is_doubtful, strict=True) if not doubtful]
        encoded = self._encode(sure)
        if len(sure) == len(texts):
            return encoded
        doubtful_texts = [
            text for text, doubtful in zip(texts, is_doubtful, strict=True) if doubtful
        ]
        return _merged(is_doubtful, encoded, self._reference.encode(doubtful_texts))

    def _encode(self, texts: Sequence[str]) -> EncodedTexts:
        with self._lock:
            self._forget_words(sum(map(len, texts)))
            gigatoken = self._gigatoken
        if not texts:
            return EncodedTexts(np.zeros(0, np.uint32), np.zeros(1, np.int64))
        # An awkward array: its two buffers are taken without a copy into lists.
        try:
            layout = gigatoken.encode_batch(list(texts), parallel=False).layout
        except BaseException as error:  # a panic of Rust is no Exception
            if not _is_failure(error):
                raise
            logger.warning("tokenizers encodes what gigatoken cannot: %s", _first_line(error))
            return self._reference.encode(texts)
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        token_ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return EncodedTexts(token_ids, offsets - offsets[0])

    def _load(self) -> None:
        from gigatoken import Tokenizer as Gigatoken

        # Released first, so that memory holds one, unless another thread still uses it.
        self._gigatoken = None
        self._gigatoken = Gigatoken.from_json(self._json).backend
        self._num_characters = 0
        self._resident_bytes = resident_bytes()

    def _forget_words(self, num_characters: int) -> None:
        self._num_characters += num_characters
        if self._resident_bytes:
            is_full = (resident_bytes() or 0) - self._resident_bytes > _MAX_CACHE_BYTES
        else:
            is_full = self._num_characters > _MAX_CACHE_CHARACTERS
        if is_full:
            self._load()


def make_encoder(backend: Tokenizer, name: BackendName) -> Encoder:
    """The encoder of a back end."""
    return ReferenceEncoder(backend) if name == "tokenizers" else GigatokenEncoder(backend)


def choose_encoder(
    backend: Tokenizer, wanted: BackendName | Literal["auto"], texts: Sequence[str]
) -> Encoder:
    """The encoder for `--tokenizer_backend`; `auto` is the fastest that gives the ids of the reference.

    Args:
        backend: the tokenizer.
        wanted: the option.
        texts: compared in addition to `adversarial_texts`.

    Raises:
        MissingExtraError: `wanted` is gigatoken, which is not installed.
        TokenizerError: `wanted` is gigatoken, which does not fit this tokenizer.
    """
    reference = ReferenceEncoder(backend)
    if wanted == "tokenizers":
        return reference
    if not _is_installed("gigatoken"):
        if wanted == "auto":
            return reference
        raise MissingExtraError(
            "--tokenizer_backend gigatoken: the package gigatoken is not installed; "
            f"install it with: {install_command('data')}"
        )
    problem = "it is not a byte-level BPE with GPT-2's pattern"
    if is_plain_byte_level(backend):
        try:
            encoder = GigatokenEncoder(backend)
            found = difference(encoder, reference, [*adversarial_texts(), *texts])
        except TokenizerError:  # of the reference
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            if not _is_failure(error):
                raise
            problem = f"it cannot open it ({_first_line(error)})"
        else:
            if found is None:
                return encoder
            problem = f"tokenizers encodes {found} differently"
    if wanted == "gigatoken":
        raise TokenizerError(
            f"--tokenizer_backend gigatoken does not fit this tokenizer: {problem}; pass tokenizers"
        )
    logger.warning("encoding with tokenizers instead of gigatoken, which is faster: %s", problem)
    return reference


def _is_failure(error: BaseException) -> bool:
    """Whether a library failed, by an exception or by a panic of Rust."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def difference(encoder: Encoder, reference: Encoder, texts: Sequence[str]) -> str | None:
    """The first of `texts` with different ids, shortened; None if the two agree."""
    ours, theirs = encoder.encode(texts), reference.encode(texts)
    for index, text in enumerate(texts):
        found, expected = (
            encoded.token_ids[encoded.offsets[index] : encoded.offsets[index + 1]]
            for encoded in (ours, theirs)
        )
        if not np.array_equal(found, expected):
            return repr(text[:80])
    return None


def is_plain_byte_level(backend: Tokenizer) -> bool:
    """Whether it is a byte-level BPE with GPT-2's pattern and no other step.

    Then a match ends where a word ends, and only the classes letter, number and white space of a character
    matter.
    """
    model, pre_tokenizer = backend.model, backend.pre_tokenizer
    return (
        isinstance(model, models.BPE)
        and not (model.dropout or model.ignore_merges)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        and backend.normalizer is None
        and isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
        and pre_tokenizer.use_regex
        and not pre_tokenizer.add_prefix_space
        # Added tokens that are not special would match inside text.
        and all(token.special for token in backend.get_added_tokens_decoder().values())
    )


def what_is_lost(backend: Tokenizer) -> str | None:
    """The parts of texts that a BPE leaves out without a word, as it has no token for them; None if none."""
    model = backend.model
    if not isinstance(model, models.BPE) or model.unk_token is not None or model.byte_fallback:
        return None
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return "characters that are not in its vocabulary"
    # The bytes 0xc0, 0xc1 and above 0xf4 never occur in UTF-8.
    possible = [*range(0xC0), *range(0xC2, 0xF5)]
    missing = [byte for byte in possible if backend.token_to_id(_byte_characters()[byte]) is None]
    return f"{len(missing)} of the 256 bytes, such as {missing[0]:#04x}" if missing else None


@cache
def _byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte in the vocabulary of a byte-level BPE (Radford et al. 2019)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in shown else next(others)) for byte in range(256))


def pieces(text: str, num_characters: int, *, max_word: int = MAX_WORD_CHARACTERS) -> Iterator[str]:
    """A text in pieces of about `num_characters`, which a byte-level BPE encodes as it does the whole.

    A piece without a border is cut anywhere after `max_word` characters.
    """
    start = 0
    while len(text) - start > num_characters:
        end = start + num_characters
        cut = _last_border(text, end - min(num_characters // 2, _NEAR_CHARACTERS), end)
        if cut is None:
            limit = start + max(num_characters, max_word)
            found = _BORDER.search(text, end - 1, limit)
            cut = found.end() if found else limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _last_border(text: str, start: int, end: int) -> int | None:
    # One more character, which the pattern looks at.
    borders = [found.end() for found in _BORDER.finditer(text, start, end + 1)]
    return borders[-1] if borders else None


def has_doubtful_character(text: str) -> bool:
    """Whether the class of a character of `text` may differ between Unicode versions."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    beyond = codes[codes > _LAST_OF_PLANE]
    if len(beyond):
        codes = codes[codes <= _LAST_OF_PLANE]
        if any(_is_doubtful(code) for code in np.unique(beyond).tolist()):
            return True
    return bool(_doubtful_in_plane()[codes].any())


def adversarial_texts() -> list[str]:
    """Texts on which encoders have differed, or might."""
    parts = [
        "'s",
        "'S",
        "'re",
        "don't",
        "\u2019s",
        " ",
        "  ",
        "\n",
        "\t\r\n",
        "\u00a0",
        "\u2028",
        "\x85",
        "\x1c",
    ]
    parts += [
        "a",
        "Z",
        "é",
        "e\u0301",
        "ß",
        "İ",
        "ſ",
        "K",
        "中",
        "\U00030edd",
        "\U0001f642",
        "👨‍👩‍👧",
        "०",
        "½",
        "Ⅷ",
    ]
    parts += [
        "\ufeff",
        "\u200b",
        "\u200d",
        "\ufffd",
        "\x00",
        "\x7f",
        "١",
        "ا",
        "한",
        "ไ",
        "𝔘",
        "\U000e0001",
        "[DOC_END]",
    ]
    pairs = [first + second for first in parts for second in parts]
    return [
        *parts,
        *pairs,
        " ".join(parts),
        "".join(pairs),
        "x" * 5000,
        " " * 999 + "x",
        "a b" * 999,
    ]


@cache
def _doubtful_in_plane() -> NDArray[np.bool_]:
    """For each code point of the basic plane, whether it is doubtful."""
    return np.array([_is_doubtful(code) for code in range(_LAST_OF_PLANE + 1)])


def _is_doubtful(code: int) -> bool:
    """Whether the class of a character (letter, number, white space, other) may differ between versions.

    It does not for a character that is assigned and has the same class in Unicode 3.2 (2002) as in this
    Python's tables. The rest is doubtful: letters added since, characters that changed, and code points that
    are not assigned yet and may become letters.
    """
    character = chr(code)
    category = unicodedata.category(character)
    then = unicodedata.ucd_3_2_0.category(character)
    return category == "Cn" or _class(category) != _class(then)


def _class(category: str) -> str:
    return category[0] if category[0] in "LNZ" else "other"


def _without_control_tokens(backend: Tokenizer) -> str:
    """tokenizer.json without control tokens and post-processing."""
    plain = Tokenizer(backend.model)
    plain.pre_tokenizer = backend.pre_tokenizer
    plain.decoder = backend.decoder
    return plain.to_str()


def _merged(is_second: Sequence[bool], first: EncodedTexts, second: EncodedTexts) -> EncodedTexts:
    """The texts of both in their order; `is_second` tells which of the two each text comes from."""
    sources = (
        iter(np.split(first.token_ids, first.offsets[1:-1]) if len(first.offsets) > 1 else []),
        iter(np.split(second.token_ids, second.offsets[1:-1]) if len(second.offsets) > 1 else []),
    )
    ids = [next(sources[int(choice)]) for choice in is_second]
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(text_ids) for text_ids in ids], out=offsets[1:])
    return EncodedTexts(np.concatenate(ids), offsets)
