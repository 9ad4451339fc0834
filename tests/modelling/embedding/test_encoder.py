"""The format of sentence-transformers: written, read again, computed by hand, and opened by that library."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from full_stack_transformer.arguments.models import WhitenArguments
from full_stack_transformer.errors import FullStackTransformerError, ModelError, UsageError
from full_stack_transformer.modelling.embedding.encoder import open_sentence_encoder
from full_stack_transformer.modelling.embedding.head import (
    POOLING_MODES,
    Dense,
    Head,
    PoolingMode,
    read_head,
    write_head,
)
from full_stack_transformer.modelling.embedding.whitening import (
    fit_whitening,
    whitening_dense,
)
from full_stack_transformer.modelling.embedding.whitening import (
    main as whiten,
)
from full_stack_transformer.modelling.model_directory import save_model_directory
from full_stack_transformer.tasks.opening import open_task

TEXTS = [
    "The reader learns from the documents.",
    "A small model",
    "Every sample never forgets its neighbours, the corpus, or the tokenizer. " * 3,
    "café and 日本語 🙂",
    "The tokenizer begins with a long sentence.",
    "The corpus looks for the next token.",
    "x",
]


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A masked language model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory = tmp_path_factory.mktemp("encoder") / "model"
    backbone = BertForMaskedLM(config)
    tokenizer_directory = directory.with_name("tokenizer")
    tokenizer.save_pretrained(tokenizer_directory)
    save_model_directory(
        directory, backbone, tokenizer_directory=tokenizer_directory, description={}
    )
    return directory


def _with_head(encoder_dir: Path, target: Path, head: Head) -> Path:
    target.mkdir()
    for file in encoder_dir.iterdir():
        (target / file.name).symlink_to(file)
    write_head(target, head, hidden_size=16, num_layers=3, max_length=24)
    return target


def _by_hand(directory: Path, text: str, mode: PoolingMode) -> NDArray[np.float32]:
    """One text without padding through transformers' own classes."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    backbone = AutoModel.from_pretrained(directory).eval()
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=24)
    with torch.inference_mode():
        states = backbone(**inputs, output_hidden_states=True).hidden_states
    pooled = {
        "cls": states[-1][0, 0],
        "last": states[-1][0, -1],
        "mean": states[-1][0].mean(0),
        "max": states[-1][0].amax(0),
        "first_last_avg": (states[1][0].mean(0) + states[-1][0].mean(0)) / 2,
    }[mode]
    array: NDArray[np.float32] = pooled.numpy()
    return array


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_the_vectors_equal_one_text_at_a_time(
    mode: PoolingMode, encoder_dir: Path, tmp_path: Path
) -> None:
    directory = _with_head(encoder_dir, tmp_path / "model", Head(mode))
    encoder = open_sentence_encoder(directory, device="cpu")
    assert encoder.head == Head(mode)
    assert (encoder.max_length, encoder.dimension) == (24, 16)
    expected = np.stack([_by_hand(directory, text, mode) for text in TEXTS])
    for batch_size in (1, 3, 32):
        found = encoder.encode(TEXTS, batch_size=batch_size)
        assert np.abs(found - expected).max() < 1e-5


def test_a_directory_without_modules_is_read_with_the_mean(encoder_dir: Path) -> None:
    encoder = open_sentence_encoder(encoder_dir, device="cpu")
    expected = _by_hand(encoder_dir, TEXTS[0], "mean")
    assert np.abs(encoder.encode([TEXTS[0]])[0] - expected).max() < 1e-5
    assert encoder.encode([]).shape == (0, 16)


def test_a_causal_model_embeds_too(model_dir: Path) -> None:
    encoder = open_sentence_encoder(model_dir, device="cpu")
    vectors = encoder.encode(TEXTS)
    assert np.abs(encoder.encode(TEXTS, batch_size=1) - vectors).max() < 1e-5


def test_the_whitening_that_is_written_is_read_and_computed_by_hand(
    encoder_dir: Path, tmp_path: Path
) -> None:
    vectors = open_sentence_encoder(encoder_dir, device="cpu").encode(TEXTS)
    whitening = fit_whitening(vectors, num_dimensions=4)
    directory = _with_head(
        encoder_dir, tmp_path / "model", Head("mean", (whitening_dense(whitening),))
    )
    tensors = load_file(directory / "2_Dense" / "model.safetensors")
    by_hand = vectors @ tensors["linear.weight"].numpy().T + tensors["linear.bias"].numpy()
    encoder = open_sentence_encoder(directory, device="cpu")
    encoder.max_length = 64
    found = encoder.encode(TEXTS)
    assert found.shape == (len(TEXTS), 4)
    assert np.abs(found - by_hand).max() < 1e-5
    assert np.abs(found - whitening.transform(vectors)).max() < 1e-4
    modules = json.loads((directory / "modules.json").read_text("utf-8"))
    assert [(one["path"], one["type"].rpartition(".")[2]) for one in modules] == [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Dense", "Dense"),
    ]
    config = json.loads((directory / "2_Dense" / "config.json").read_text("utf-8"))
    assert (config["in_features"], config["out_features"], config["bias"]) == (16, 4, True)


def test_normalized_vectors_have_length_one(encoder_dir: Path, tmp_path: Path) -> None:
    directory = _with_head(encoder_dir, tmp_path / "model", Head("cls", is_normalized=True))
    vectors = open_sentence_encoder(directory, device="cpu").encode(TEXTS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"embedding_dimension": 16, "pooling_mode": "lasttoken"}, "last"),
        ({"word_embedding_dimension": 16, "pooling_mode_max_tokens": True}, "max"),
        ({"word_embedding_dimension": 16}, "mean"),
    ],
    ids=["newer", "older", "default"],
)
def test_the_poolings_of_other_versions_are_read(
    config: dict[str, object], mode: str, tmp_path: Path
) -> None:
    write_head(tmp_path, Head(), hidden_size=16, num_layers=3, max_length=24)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config), "utf-8")
    assert read_head(tmp_path, device=torch.device("cpu"))[0].pooling == mode


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("modules.json", "[", "Expecting value"),
        ("modules.json", '[{"path": "", "type": "my.Router"}]', "unknown module my.Router"),
        ("1_Pooling/config.json", '{"pooling_mode": ["cls", "max"]}', "unknown pooling"),
        ("1_Pooling/config.json", '{"pooling_mode_weightedmean_tokens": true}', "unknown pooling"),
        ("2_Dense/config.json", '{"activation_function": "my.Function"}', "unknown Dense layer"),
        ("2_Dense/model.safetensors", None, "No such file"),
    ],
    ids=["no-json", "module", "two-poolings", "pooling", "activation", "no-weights"],
)
def test_what_is_not_known_is_refused_by_name(
    file: str, content: str | None, reason: str, tmp_path: Path
) -> None:
    head = Head("mean", (Dense(torch.eye(16), None),))
    write_head(tmp_path, head, hidden_size=16, num_layers=3, max_length=24)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content, "utf-8")
    with pytest.raises(ModelError, match=reason):
        read_head(tmp_path, device=torch.device("cpu"))


def test_weights_that_lack_tensors_are_refused(encoder_dir: Path, tmp_path: Path) -> None:
    directory = _with_head(encoder_dir, tmp_path / "model", Head())
    config = json.loads((encoder_dir / "config.json").read_text("utf-8"))
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}), "utf-8")
    with pytest.raises(ModelError, match=r"lack 16 tensors"):
        open_sentence_encoder(directory, device="cpu")
    with pytest.raises(ModelError, match="should be a model directory"):
        open_sentence_encoder(tmp_path / "nothing", device="cpu")


def test_the_command_whitens_a_model(
    encoder_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join([*TEXTS[:4], "", TEXTS[0]]), "utf-8")
    pairs = {"sentence1": TEXTS[4], "sentence2": TEXTS[5]}, {"text": TEXTS[6]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in pairs), "utf-8")
    target = tmp_path / "models" / "whitened"
    arguments = WhitenArguments(
        encoder_dir,
        (lines, rows),
        output_dir=target,
        num_dimensions=5,
        max_length=40,
        device="cpu",
    )
    assert whiten(arguments) == target
    assert "fitted the whitening on 7 texts" in caplog.text
    vectors = open_sentence_encoder(target, device="cpu").encode(TEXTS).astype(np.float64)
    assert np.abs(vectors.mean(axis=0)).max() < 1e-4
    assert np.abs(vectors.T @ vectors / 7 - np.eye(5)).max() < 1e-3
    # Evaluated and served it embeds too, though its weights still hold the head of a masked model.
    opened = open_task(target, device="cpu")
    assert opened.name == "sentence_embedding"
    found = opened.predict([{"text": text} for text in TEXTS])
    assert np.abs(np.array([one["embedding"] for one in found]) - vectors).max() < 1e-4
    description = json.loads((target / "description.json").read_text("utf-8"))
    assert description["whitening"]["num_dimensions"] == 5
    weights = "model.safetensors"
    assert (target / weights).read_bytes() == (encoder_dir / weights).read_bytes()
    with pytest.raises(UsageError, match="exists"):
        whiten(arguments)
    # A whitened model can be whitened again: the older Dense layer goes.
    again = dataclasses.replace(arguments, model=target, output_dir=tmp_path / "again")
    assert sorted(one.name for one in whiten(again).iterdir() if one.is_dir()) == [
        "1_Pooling",
        "2_Dense",
    ]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("one text\n", "texts.txt", "at least two texts"),
        ("\n", "texts.txt", "should hold lines of text"),
        ('{"other": "a"}\n', "texts.jsonl", "should hold texts under text, sentence1"),
        ("no json\n", "texts.jsonl", "line 1: should be a JSON object"),
    ],
    ids=["one-text", "no-text", "no-field", "no-json"],
)
def test_texts_that_fit_nothing_end_in_one_sentence(
    content: str, name: str, message: str, encoder_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    options = WhitenArguments(encoder_dir, (tmp_path / name,), output_dir=tmp_path / "out")
    with pytest.raises(FullStackTransformerError, match=message):
        whiten(options)
    assert not (tmp_path / "out").exists()


_PEER = """
import sys, warnings
import numpy as np
warnings.simplefilter("ignore")
from sentence_transformers import SentenceTransformer
texts = sys.argv[1].split("|")
for directory in sys.argv[2:]:
    np.save(directory + "/theirs.npy", SentenceTransformer(directory, device="cpu").encode(texts))
"""


def test_sentence_transformers_gives_the_same_vectors(encoder_dir: Path, tmp_path: Path) -> None:
    directories = []
    for mode in POOLING_MODES:
        plain = _with_head(encoder_dir, tmp_path / f"{mode}-plain", Head(mode))
        vectors = open_sentence_encoder(plain, device="cpu").encode(TEXTS)
        dense = whitening_dense(fit_whitening(vectors, num_dimensions=4))
        head = Head(mode, (dense,), is_normalized=mode == "max")
        directories += [plain, _with_head(encoder_dir, tmp_path / f"{mode}-whitened", head)]
    # A process of its own: the library sets up warnings and logging of everybody.
    subprocess.run(
        [sys.executable, "-c", _PEER, "|".join(TEXTS), *directories], check=True, timeout=600
    )
    for directory in directories:
        ours = open_sentence_encoder(directory, device="cpu").encode(TEXTS)
        assert np.abs(np.load(directory / "theirs.npy") - ours).max() < 1e-5, directory.name
