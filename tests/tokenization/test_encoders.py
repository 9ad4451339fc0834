"""Every back end gives the ids of the reference, whatever the text, and memory stays bounded."""

import random
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from full_stack_transformer.errors import TokenizerError
from full_stack_transformer.tokenization import encoders
from full_stack_transformer.tokenization.document_tokenizer import (
    TrainedTokenizer,
    load_tokenizer,
)
from full_stack_transformer.tokenization.encoders import (
    EncodedTexts,
    GigatokenEncoder,
    ReferenceEncoder,
    adversarial_texts,
    choose_encoder,
    difference,
    has_doubtful_character,
    is_plain_byte_level,
    pieces,
    what_is_lost,
)
from tests.conftest import SHARED_DATA

CONTROLS = ("[DOC_START]", "[DOC_END]", "[PAD]", "<|endoftext|>", "[END_OF_DOCUMENT]")


@pytest.fixture(scope="module", params=["gpt2", "trained"])
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "gpt2":
        if not SHARED_DATA.is_dir():
            pytest.skip("GPT-2's vocabulary is not here: expected ../shared/data/gpt2")
        return load_tokenizer("GPT2Tokenizer", str(SHARED_DATA / "gpt2")).backend
    texts = ["the cat's hat isn't here, we'll see 123 times\n\n  naïve 日本語 🙂"] * 3
    return TrainedTokenizer.train([*texts, *adversarial_texts()], vocab_size=600).backend


@pytest.fixture(scope="module")
def gigatoken(backend: Tokenizer) -> GigatokenEncoder:
    return GigatokenEncoder(backend)


@pytest.fixture(scope="module")
def reference(backend: Tokenizer) -> ReferenceEncoder:
    return ReferenceEncoder(backend)


def _ids(encoded: EncodedTexts) -> list[list[int]]:
    pieces = np.split(encoded.token_ids, encoded.offsets[1:-1]) if len(encoded.offsets) > 1 else []
    return [piece.tolist() for piece in pieces]


def test_the_reference_is_encoding_one_by_one(backend: Tokenizer) -> None:
    texts = [*adversarial_texts()[:300], "", *CONTROLS]
    expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert _ids(ReferenceEncoder(backend).encode(texts)) == expected
    assert _ids(ReferenceEncoder(backend).encode([])) == []


def test_gigatoken_agrees_on_adversarial_texts(backend: Tokenizer) -> None:
    texts = [*adversarial_texts(), "", *CONTROLS, "x".join(CONTROLS)]
    assert difference(GigatokenEncoder(backend), ReferenceEncoder(backend), texts) is None
    assert _ids(GigatokenEncoder(backend).encode([])) == []


_PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(CONTROLS),
    st.sampled_from(adversarial_texts()[:45]),
    st.sampled_from(["the ", " cat", "'s", "n't", "123", " \n", "\t"]),
    st.characters(codec="utf-8", min_codepoint=0x2E80, max_codepoint=0x323AF).map(
        lambda one: f"{one}'s"
    ),
)
_DOCUMENTS = st.lists(st.lists(_PIECES, max_size=8).map("".join), min_size=100, max_size=100)


# 100 examples of 100 documents, for two tokenizers: 20,000 random documents.
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(documents=_DOCUMENTS)
def test_random_documents_encode_as_the_reference_does(
    backend: Tokenizer,
    gigatoken: GigatokenEncoder,
    reference: ReferenceEncoder,
    documents: list[str],
) -> None:
    ours = _ids(gigatoken.encode(documents))
    assert ours == _ids(reference.encode(documents))
    control_ids = {
        token_id for token in CONTROLS[:4] if (token_id := backend.token_to_id(token)) is not None
    }
    assert not control_ids & {token_id for ids in ours for token_id in ids}


def test_every_character_that_is_sure_splits_as_in_the_reference(backend: Tokenizer) -> None:
    """Each of 104,000 characters in the contexts that its class decides: exhaustive, not random."""
    sure = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if not encoders._is_doubtful(code) and unicodedata.category(chr(code)) != "Cs"
    ]
    # Private use is more than half of them, and all of one class.
    sure = [one for one in sure if unicodedata.category(one) != "Co"]
    assert len(sure) > 100_000
    texts = [f"a{one}b 1{one}2 {one}'s  {one}\n {one} {one}{one}" for one in sure]
    assert difference(GigatokenEncoder(backend), ReferenceEncoder(backend), texts) is None


def test_letters_of_recent_years_go_to_the_reference() -> None:
    for doubtful in ("\U0002ebf0", "\U000323b0", "\U00030edd", "\u0870", "\U0001e030", "\u1c89"):
        assert has_doubtful_character(f"plain {doubtful} text")
    for sure in (
        "plain",
        "naïve",
        "日本語",
        "русский",
        "🙂 \U0001f642",
        "한국어",
        "ไทย",
        "\u2028",
        "½",
    ):
        assert not has_doubtful_character(sure)


def test_documents_of_both_kinds_keep_their_order(backend: Tokenizer) -> None:
    numbers = random.Random(0)
    texts = [
        numbers.choice(["plain text", "naïve", "\U0002ebf0's", "", "b\u0870"]) for _ in range(200)
    ]
    ours = _ids(GigatokenEncoder(backend).encode(texts))
    assert ours == _ids(ReferenceEncoder(backend).encode(texts))


def test_the_cache_of_words_is_forgotten(
    backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = GigatokenEncoder(backend)
    first = encoder._gigatoken
    # Memory that others give back meanwhile may be more than what the encoder took.
    monkeypatch.setattr(encoders, "_MAX_CACHE_BYTES", -(1 << 60))
    assert _ids(encoder.encode(["the cat"])) == _ids(ReferenceEncoder(backend).encode(["the cat"]))
    assert encoder._gigatoken is not first
    monkeypatch.setattr(encoders, "resident_bytes", lambda: None)
    monkeypatch.setattr(encoders, "_MAX_CACHE_CHARACTERS", 10)
    encoder._load()
    second = encoder._gigatoken
    encoder.encode(["short"])
    assert encoder._gigatoken is second
    encoder.encode(["longer than ten characters"])
    assert encoder._gigatoken is not second


def test_only_plain_byte_level_tokenizers_are_trusted(backend: Tokenizer) -> None:
    assert is_plain_byte_level(backend)
    assert choose_encoder(backend, "auto", ["text"]).name == "gigatoken"
    assert choose_encoder(backend, "tokenizers", ["text"]).name == "tokenizers"
    others = [Tokenizer.from_str(backend.to_str()) for _ in range(4)]
    others[0].normalizer = normalizers.Lowercase()
    others[1].pre_tokenizer = pre_tokenizers.Whitespace()
    others[2].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    others[3].add_tokens(["word"])
    others.append(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
    for other in others:
        assert not is_plain_byte_level(other)
        assert choose_encoder(other, "auto", ["text"]).name == "tokenizers"
        with pytest.raises(TokenizerError, match="--tokenizer_backend gigatoken does not fit"):
            choose_encoder(other, "gigatoken", ["text"])


def test_a_difference_is_noticed_and_falls_back_aloud(
    backend: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(GigatokenEncoder):
        def encode(self, texts):  # type: ignore[no-untyped-def]
            encoded = super().encode(texts)
            encoded.token_ids[-1] += 1
            return encoded

    monkeypatch.setattr(encoders, "GigatokenEncoder", Broken)
    assert choose_encoder(backend, "auto", ["the cat"]).name == "tokenizers"
    assert "tokenizers encodes 'the cat' differently" in caplog.text


def _lacking_bytes() -> Tokenizer:
    """A byte-level BPE with the bytes of some words alone, as some published vocabularies lack a few."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>"], show_progress=False)
    backend.train_from_iterator(["the quick brown fox"] * 9, trainer=trainer)
    return backend


def test_a_vocabulary_that_lacks_bytes_goes_to_the_reference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = _lacking_bytes()
    assert choose_encoder(backend, "auto", ["the fox"]).name == "tokenizers"
    [record] = caplog.records
    assert "instead of gigatoken" in record.getMessage()
    assert "\n" not in record.getMessage()
    with pytest.raises(
        TokenizerError, match=r"does not fit this tokenizer: it cannot open it .*pass tokenizers"
    ):
        choose_encoder(backend, "gigatoken", ["the fox"])
    lost = what_is_lost(backend)
    assert lost is not None
    assert "of the 256 bytes, such as 0x00" in lost
    assert what_is_lost(TrainedTokenizer.train(["a"], vocab_size=300).backend) is None


@pytest.mark.parametrize("failure", [RuntimeError("broken"), BaseException("a panic")], ids=repr)
def test_any_failure_of_the_fast_encoder_is_made_good(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is opened, and while it encodes; but not Ctrl-C."""
    backend = TrainedTokenizer.train(["the cat"], vocab_size=300).backend
    expected = _ids(ReferenceEncoder(backend).encode(["the cat", "é"]))

    class PanicException(BaseException):
        """As the bindings of Rust raise it."""

    def fail(*_: object, **__: object) -> None:
        raise failure if isinstance(failure, Exception) else PanicException(failure)

    encoder = GigatokenEncoder(backend)
    monkeypatch.setattr(encoder, "_gigatoken", type("Broken", (), {"encode_batch": fail})())
    assert _ids(encoder.encode(["the cat", "é"])) == expected
    monkeypatch.setattr(GigatokenEncoder, "_load", fail)
    assert choose_encoder(backend, "auto", []).name == "tokenizers"
    monkeypatch.setattr(
        GigatokenEncoder, "_load", lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        choose_encoder(backend, "auto", [])


@pytest.mark.parametrize(
    "model",
    [
        models.WordPiece({"the": 0}, unk_token="[UNK]"),
        models.WordLevel({"the": 0}, unk_token="[UNK]"),
        models.Unigram([("the", 0.0)]),
    ],
    ids=["WordPiece", "WordLevel", "Unigram"],
)
def test_a_tokenizer_without_an_unknown_token_is_named(model: models.Model) -> None:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = choose_encoder(backend, "auto", ["the"])
    with pytest.raises(TokenizerError, match=r"cannot encode a text .* add one: unk_token"):
        encoder.encode(["the cat"])


_PIECE_TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from("ab '\n\t\r.,!1é中文字、。，\u3000\u2028\x1c\x85カ\U0001f642"),
        st.characters(codec="utf-8"),
    ),
    max_size=300,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=_PIECE_TEXTS, size=st.integers(2, 40))
def test_pieces_have_the_ids_of_the_whole(
    backend: Tokenizer, text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "_NEAR_CHARACTERS", 8)
    found = list(pieces(text, size))
    assert "".join(found) == text
    reference = ReferenceEncoder(backend)
    joined = [token_id for ids in _ids(reference.encode(found)) for token_id in ids]
    assert joined == _ids(reference.encode([text]))[0]


def test_a_word_without_an_end_is_cut_anyway() -> None:
    cut = pieces("x" * 120 + " y", 10, max_word=50)
    assert [len(piece) for piece in cut] == [50, 50, 20, 2]
