"""Text to ids and back; text never becomes a control token; a stream equals the whole."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self, cast

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.errors import TokenizerError, UsageError
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    GPT2Tokenizer,
    TextStream,
    TrainedTokenizer,
    class_name,
    load_tokenizer,
    open_saved_tokenizer,
)
from tests.conftest import SHARED_DATA

CONTROL_TEXTS = ("[DOC_START]", "[DOC_END]", "[PAD]", "<|endoftext|>")


@pytest.fixture(scope="module")
def trained() -> TrainedTokenizer:
    texts = ["the cat sat on the mat, the cat ate", "naïve café 🙂 日本語", "x = [1, 2]\n\n  y"] * 5
    return TrainedTokenizer.train(texts, vocab_size=400)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(CONTROL_TEXTS)), max_size=6))
def test_every_text_survives_and_holds_no_control_token(
    trained: TrainedTokenizer, parts: list[str]
) -> None:
    text = "".join(parts)
    [ids] = trained.encode_documents([text])
    assert ids[0] == trained.begin_id
    assert ids[-1] == trained.end_id
    control_ids = {trained.begin_id, trained.end_id, trained.pad_id}
    assert not control_ids & set(ids[1:-1])
    assert trained.decode(ids) == text


def test_a_saved_tokenizer_is_the_same_and_safe(trained: TrainedTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path, model_max_length=99)
    again = open_saved_tokenizer(tmp_path)
    text = "the cat [DOC_END] 🙂"
    assert type(again) is TrainedTokenizer
    assert again.encode_documents([text]) == trained.encode_documents([text])
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.get_vocab() == trained.backend.get_vocab()


def test_transformers_opens_a_saved_tokenizer(trained: TrainedTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path, model_max_length=99)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat [DOC_END]")["input_ids"] == trained.encode_prompt("the cat [DOC_END]")
    assert theirs.model_max_length == 99
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (trained.begin_id, trained.end_id, trained.pad_id)


def test_training_is_deterministic() -> None:
    texts = ["ab ab abc", "bc bcd", "abcd abab"] * 3
    tokenizers = [TrainedTokenizer.train(iter(texts), vocab_size=280) for _ in range(2)]
    assert tokenizers[0].backend.to_str() == tokenizers[1].backend.to_str()


def _stream(tokenizer: DocumentTokenizer, ids: Sequence[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()


def _sentencepiece() -> DocumentTokenizer:
    """As Llama 2 had it: words with a mark for the space, and a token for each byte."""
    words = ("▁", "▁the", "▁cat", "s", "at", "é", "▁▁", "\ufffd", "日")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return DocumentTokenizer(backend, begin="<s>", end="</s>", pad="</s>")


def _wordpiece() -> DocumentTokenizer:
    """As BERT has it: decoding puts spaces between words and takes them away before full stops."""
    names = ["[UNK]", "[CLS]", "[SEP]", "the", "##s", "##at", "a", ".", ",", "n't", "'", "日", "do"]
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return DocumentTokenizer(backend, begin="[CLS]", end="[SEP]", pad="[SEP]")


def _sequences(tokenizer: DocumentTokenizer, count: int) -> Iterator[list[int]]:
    """Random ids, ids of single bytes, and texts of all alphabets in which tokens are missing or twice."""
    numbers = random.Random(0)
    # Also ids that the tokenizer does not have: a model's vocabulary may be padded.
    everything = range(tokenizer.vocab_size + 2)
    short = [i for i in everything if len(tokenizer.backend.id_to_token(i) or "") <= 2]
    alphabet = "aé ß\n日本語🙂👩‍👩‍👧🇩🇪\u0301\ufffd\U0010ffff\x00"
    for number in range(count):
        length = numbers.randrange(1, 30)
        if number % 3 == 2:
            text = "".join(numbers.choices(alphabet, k=length))
            ids = tokenizer.encode_text(text)
            yield [token_id for token_id in ids for _ in range(numbers.choice((0, 1, 1, 1, 2)))]
        else:
            yield numbers.choices(everything if number % 3 else short, k=length)


@pytest.fixture(scope="module", params=["trained", "gpt2", "sentencepiece", "wordpiece"])
def any_tokenizer(request: pytest.FixtureRequest) -> DocumentTokenizer:
    if request.param == "gpt2":
        if not SHARED_DATA.is_dir():
            pytest.skip("GPT-2's vocabulary is not here: expected ../shared/data/gpt2")
        return load_tokenizer("GPT2Tokenizer", str(SHARED_DATA / "gpt2"))
    if request.param == "trained":
        return cast(DocumentTokenizer, request.getfixturevalue("trained"))
    return _sentencepiece() if request.param == "sentencepiece" else _wordpiece()


@pytest.mark.parametrize(
    "count", [2500, pytest.param(100_000, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_stream_of_any_tokens_equals_the_whole(
    any_tokenizer: DocumentTokenizer, count: int
) -> None:
    for ids in _sequences(any_tokenizer, count):
        assert _stream(any_tokenizer, ids) == any_tokenizer.decode(ids)


def test_a_stream_of_broken_bytes_does_not_wait_for_its_end(trained: TrainedTokenizer) -> None:
    """A character is held back until it is complete or cannot be completed any more."""
    first_of_four = trained.backend.get_vocab()["ð"]
    stream = TextStream(trained)
    pieces = [stream.push(first_of_four) for _ in range(50)]
    assert pieces == ["", *["\ufffd"] * 49]
    assert stream.finish() == "\ufffd"


def test_a_stream_holds_back_half_a_character(trained: TrainedTokenizer) -> None:
    ids = [
        trained.backend.get_vocab()[token]
        for token in ("ð", "Ł", "ĻĤ"[0], "ĻĤ"[1])  # the four bytes of one emoji
    ]
    stream = TextStream(trained)
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", trained.decode(ids)]
    assert len(trained.decode(ids)) == 1


def test_gpt2_frames_a_document_with_spaces() -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("GPT-2's vocabulary is not here: expected ../shared/data/gpt2")
    tokenizer = load_tokenizer("GPT2Tokenizer", str(SHARED_DATA / "gpt2"))
    [ids] = tokenizer.encode_documents(["Hello world"])
    assert ids == [50257, 18435, 995, 220, 50258]
    assert tokenizer.vocab_size == 50260
    assert tokenizer.encode_prompt("Hello") == [50257, 18435]
    assert type(load_tokenizer(None, str(SHARED_DATA / "gpt2"))) is GPT2Tokenizer


class ShoutingTokenizer(TrainedTokenizer):
    """What a user writes: another text before encoding, the same vocabulary."""

    @classmethod
    def load(cls, path: str | None) -> Self:
        return cls.train(["SHOUT IT", "OUT LOUD"], vocab_size=270)

    def normalize(self, text: str) -> str:
        return text.upper()


def test_a_class_of_the_user_is_found_and_remembered(tmp_path: Path) -> None:
    name = f"{__name__}.ShoutingTokenizer"
    tokenizer = load_tokenizer(name, None)
    tokenizer.save(tmp_path, model_max_length=10)
    again = load_tokenizer(None, str(tmp_path))
    assert type(again) is ShoutingTokenizer
    assert again.decode(again.encode_documents(["quiet"])[0]) == "QUIET"


def test_a_tokenizer_of_somebody_else_uses_its_own_tokens(
    dataset: DatasetDirectory, tmp_path: Path
) -> None:
    trained = open_saved_tokenizer(dataset.tokenizer_directory)
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(
        '{"cls_token": {"content": "[DOC_START]"}, "sep_token": "[DOC_END]"}'
    )
    theirs = load_tokenizer(None, str(tmp_path))
    assert (theirs.begin, theirs.end, theirs.pad) == ("[DOC_START]", "[DOC_END]", "[DOC_END]")


@pytest.mark.parametrize("name", ["NoSuchClass", "json.JSONDecoder", "pathlib.Path"])
def test_a_wrong_class_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="GPT2Tokenizer"):
        load_tokenizer(name, None)


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(UsageError, match="No module named 'no_such_module'"):
        load_tokenizer("no_such_module.MyTokenizer", None)


def test_a_directory_without_tokenizer_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        load_tokenizer(None, str(tmp_path))


def test_a_tokenizer_without_begin_and_end_is_refused(
    trained: TrainedTokenizer, tmp_path: Path
) -> None:
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="has no begin or end token"):
        load_tokenizer(None, str(tmp_path))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(None, str(tmp_path))


def test_class_names_are_short_for_our_own() -> None:
    assert class_name(GPT2Tokenizer) == "GPT2Tokenizer"
    assert class_name(ShoutingTokenizer) == f"{__name__}.ShoutingTokenizer"
