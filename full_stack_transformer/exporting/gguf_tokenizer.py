"""Tokenizers as llama.cpp reads them: vocabulary, merges, and the name of a way to split texts into words.

llama.cpp knows byte-level BPE with the splits that stand here, and SentencePiece's BPE. A vocabulary may be
any: its own converter knows only listed ones. Whether both give the same ids is seen by the check.
"""

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from full_stack_transformer.errors import TokenizerError
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer

_NO_SPLIT = "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_LLAMA3_SPLIT = f"{_CONTRACTIONS}|{_NO_SPLIT}|\\p{{N}}{{1,3}}|{_END}"
_QWEN2_SPLIT = f"{_CONTRACTIONS}|{_NO_SPLIT}|\\p{{N}}|{_END}"
# (steps of the pre-tokenizer, ignore_merges) -> its name in llama.cpp (llama-vocab.cpp)
_SPLITS = {
    (("ByteLevel+regex",), False): "gpt-2",
    (("Digits", "ByteLevel+regex"), False): "smollm",
    ((_LLAMA3_SPLIT, "ByteLevel"), True): "llama-bpe",
    ((_LLAMA3_SPLIT, "ByteLevel"), False): "dbrx",
    ((_QWEN2_SPLIT, "ByteLevel"), False): "qwen2",
}
_SPACE = "\u2581"


class Kind(IntEnum):
    """Of a token (llama.h: llama_token_type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """gpt2 for byte-level BPE, llama for SentencePiece."""
    split: str
    tokens: list[str]
    kinds: list[Kind]
    merges: list[str]
    scores: list[float]
    """Of SentencePiece's tokens; higher ones are merged first."""
    adds_begin: bool
    adds_space: bool
    normalizes: bool = False
    """Texts must be in Unicode's form NFC, which llama.cpp does not bring them into."""


def vocabulary_of(tokenizer: DocumentTokenizer, num_embeddings: int) -> Vocabulary:
    """The vocabulary, with a token for each embedding.

    Raises:
        TokenizerError: llama.cpp cannot encode texts as this tokenizer does.
    """
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, and GGUF files are written of BPE")
    if type(tokenizer).normalize is not DocumentTokenizer.normalize:
        raise _refusal(f"its class {type(tokenizer).__name__} changes texts before it encodes them")
    if model.get("dropout") or model.get("end_of_word_suffix"):
        raise _refusal("it has dropout or a suffix of words")
    if tokenizer.prefix_ids not in ([], [tokenizer.begin_id]):
        raise _refusal(f"it puts {tokenizer.prefix} before texts, where llama.cpp puts one token")
    tokens, kinds = _tokens(tokenizer, num_embeddings)
    if model.get("byte_fallback"):
        return _sentencepiece(tokenizer, content, tokens, kinds)
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refusal(f"it has the normalizer {normalizer['type']}")
    steps = _steps(content["pre_tokenizer"])
    split = _SPLITS.get((steps, bool(model.get("ignore_merges"))))
    if split is None:
        raise _refusal(f"it splits texts by {' + '.join(steps) or 'nothing'}")
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return Vocabulary(
        *("gpt2", split, tokens, kinds, merges, []),
        adds_begin=bool(tokenizer.prefix_ids),
        adds_space=False,
        normalizes=normalizer is not None,
    )


def _refusal(reason: str) -> TokenizerError:
    return TokenizerError(
        f"llama.cpp cannot encode texts as this tokenizer does: {reason}; export with --format huggingface"
    )


def _tokens(tokenizer: DocumentTokenizer, num_embeddings: int) -> tuple[list[str], list[Kind]]:
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens, kinds = [], []
    for token_id in range(num_embeddings):
        token = tokenizer.backend.id_to_token(token_id)
        kind = Kind.NORMAL
        if token is None:
            token, kind = f"[PAD{token_id}]", Kind.UNUSED
        elif token_id in added:
            one = added[token_id]
            kind = Kind.CONTROL if one.special else Kind.USER_DEFINED
            if kind == Kind.USER_DEFINED and (one.single_word or one.lstrip or one.rstrip):
                raise _refusal(f"its token {token!r} takes spaces around it, or whole words only")
        tokens.append(token)
        kinds.append(kind)
    return tokens, kinds


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The steps of a pre-tokenizer by short names; a pattern stands for itself."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for one in pre_tokenizer["pretokenizers"] for step in _steps(one))
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return ("ByteLevel+regex" if pre_tokenizer["use_regex"] else "ByteLevel",)
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return ("Digits",)
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return tuple(map(str, pre_tokenizer["pattern"].values()))
    return (json.dumps(pre_tokenizer, ensure_ascii=False),)


# ---------------------------------------------------------------------- SentencePiece


def _sentencepiece(
    tokenizer: DocumentTokenizer, content: dict[str, Any], tokens: list[str], kinds: list[Kind]
) -> Vocabulary:
    """A token is merged by its score, where tokenizers merges by the place of the pair in a list."""
    model = content["model"]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    last = float(len(ranks) + len(model["merges"]))
    scores = [-float(ranks.get(token, last)) for token in tokens]
    for token_id, token in enumerate(tokens):
        if kinds[token_id] != Kind.NORMAL:
            continue
        if token == model.get("unk_token"):
            kinds[token_id] = Kind.UNKNOWN
        elif token_id in tokenizer.byte_ids:
            kinds[token_id] = Kind.BYTE
    if model.get("unk_token") in tokens:
        kinds[tokens.index(model["unk_token"])] = Kind.UNKNOWN
    return Vocabulary(
        *("llama", "default", tokens, kinds, [], scores),
        adds_begin=bool(tokenizer.prefix_ids),
        adds_space=_adds_space(content),
    )


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether a text begins with a space that is not in it.

    Raises:
        TokenizerError: spaces are handled in another way than SentencePiece's.
    """
    normalizer, split = content["normalizer"] or {}, content["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepended = {"type": "Prepend", "prepend": _SPACE}
    if not split or split == {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }:
        if steps == [prepended, replaced]:
            return True
        if steps == [replaced]:
            return False
    if not steps and split.get("type") == "Metaspace" and not split.get("split", True):
        return bool(split["prepend_scheme"] != "never")
    raise _refusal("it handles spaces in another way than SentencePiece")
