"""GGUF files: read back they are the same model, and llama.cpp computes the same with them.

llama.cpp is asked where llama-cpp-python is installed, or by the interpreter that FST_LLAMA_CPP_PYTHON names:
    python -m pytest -m slow tests/exporting
"""

import importlib.util
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from full_stack_transformer.arguments.exporting import ExportArguments
from full_stack_transformer.arguments.models import ImportModelArguments
from full_stack_transformer.errors import ModelError, TokenizerError, UsageError
from full_stack_transformer.exporting import checking
from full_stack_transformer.exporting.command import main
from full_stack_transformer.exporting.hostile_texts import hostile_texts
from full_stack_transformer.model_sources.import_model import import_model
from full_stack_transformer.tokenization.chat import load_chat_template
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from tests.conftest import RunFst
from tests.exporting.small_exports import (
    CONFIGS,
    SENTENCEPIECE,
    SPLITS,
    make_model,
    make_tokenizer,
)


def _python() -> Path:
    named = os.environ.get("FST_LLAMA_CPP_PYTHON")
    if named is None and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("no llama-cpp-python here, and FST_LLAMA_CPP_PYTHON names no interpreter")
    return Path(named or sys.executable)


def _logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.arange(3, 43)[None]).logits
    return logits


def test_matrices_of_gpt2_are_turned(tmp_path: Path) -> None:
    model = make_model("gpt2", tmp_path / "gpt2")
    file = main(ExportArguments(model, format="gguf", output=tmp_path / "m.gguf", check=False))
    weights = load_file(model / "model.safetensors")
    found = {one.name: np.asarray(one.data) for one in GGUFReader(file).tensors}
    expected = weights["transformer.h.1.attn.c_attn.weight"].T.numpy()
    np.testing.assert_array_equal(found["blk.1.attn_qkv.weight"], expected)
    assert "output.weight" not in found, "it is that of the embeddings"


def test_a_file_imported_again_is_the_same_model(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "llama")
    file = main(ExportArguments(model, format="gguf", output=tmp_path / "model.gguf", check=False))
    again = import_model(ImportModelArguments(str(file), models_root=tmp_path / "again"))
    torch.testing.assert_close(_logits(again), _logits(model), atol=1e-4, rtol=1e-4)
    ours, theirs = open_saved_tokenizer(model), open_saved_tokenizer(again)
    for text in hostile_texts(300, ours.control_tokens):
        assert ours.encode_text(text) == theirs.encode_text(text)
    assert load_chat_template(again).source == load_chat_template(model).source


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", "q4_0"])
def test_weights_have_the_type_that_was_asked_for(dtype: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "llama")
    options = ExportArguments(
        model,
        format="gguf",
        output=tmp_path / "model.gguf",
        dtype=dtype,  # type: ignore[arg-type]
        check=False,
    )
    tensors = {one.name: one for one in GGUFReader(main(options)).tensors}
    expected = {"float16": "F16", "bfloat16": "BF16"}.get(dtype, dtype.upper())
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == expected
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_a_model_trained_here_keeps_its_vocabulary(model_dir: Path, tmp_path: Path) -> None:
    file = main(
        ExportArguments(model_dir, format="gguf", output=tmp_path / "model.gguf", check=False)
    )
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    tokenizer = open_saved_tokenizer(model_dir)
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.begin_id
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.chat_template" not in fields


def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "llama")
    options = ExportArguments(model, format="gguf", output=tmp_path / "a.gguf", check=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ModelError, match=r"hidden_act = silu alone; config\.json has gelu"):
        main(options)
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(TokenizerError, match="it splits texts by"):
        main(options)
    assert [*tmp_path.iterdir()] == [model]


def test_a_check_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that differ in one token id."""
    model = make_model("llama", tmp_path / "llama")

    def ask(_python: str, _file: Path, asked: checking.Questions, framed: object) -> object:
        return {"version": "0", "ids": [[5] for _ in asked.texts], "framed_ids": framed}

    monkeypatch.setattr(checking, "_ask", ask)
    monkeypatch.setattr(checking, "_python_with_llama_cpp", lambda _: "python")
    with pytest.raises(ModelError, match="texts differently"):
        main(ExportArguments(model, format="gguf", output=tmp_path / "model.gguf"))
    assert [*tmp_path.iterdir()] == [model]


def test_without_llama_cpp_the_check_is_skipped_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("gpt2", tmp_path / "gpt2")
    monkeypatch.setattr(checking, "_python_with_llama_cpp", lambda _: None)
    with caplog.at_level(logging.WARNING):
        main(ExportArguments(model, format="gguf", output=tmp_path / "model.gguf"))
    assert "is NOT checked" in caplog.text


def test_contradicting_options_are_refused(tmp_path: Path, run_fst: RunFst) -> None:
    done = run_fst("export", "x", "--format", "onnx", "--output", "y", "--dtype", "q4_0")
    assert done.returncode == 2
    assert "--format onnx has no weights of type q4_0" in done.stderr
    with pytest.raises(UsageError, match="exists"):
        ExportArguments(tmp_path, format="gguf", output=tmp_path)
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        ExportArguments(tmp_path, format="gguf", output=tmp_path / "x.bin")


def test_hostile_texts_are_the_same_each_time() -> None:
    texts = hostile_texts(2000, ["[DOC_END]"])
    assert texts == hostile_texts(2000, ["[DOC_END]"])
    assert len({*texts}) > 1900
    assert "a[DOC_END]b" in texts
    assert "" in texts


def test_a_wrong_token_is_seen(model_dir: Path) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompt = [0, 50, 60]
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(4):
            best = backbone(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, best[None, None]], dim=1)
    tokens = ids[0, 3:].tolist()
    line = checking.compare_continuations(backbone, [prompt], [tokens], "float32", "it")
    assert line == "4 greedy tokens after 1 prompts are equal"
    tokens[2] = (tokens[2] + 1) % 300
    with pytest.raises(ModelError, match=r"chooses [12] of 4 greedy tokens"):
        checking.compare_continuations(backbone, [prompt], [tokens], "float32", "it")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path / name)
    for dtype in ("float32", "bfloat16", "q8_0"):
        main(
            ExportArguments(
                model,
                format="gguf",
                output=tmp_path / f"{dtype}.gguf",
                dtype=dtype,
                check_python=_python(),
                num_check_texts=200,
                num_check_prompts=10,
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPLITS, SENTENCEPIECE])
def test_llama_cpp_encodes_the_same(name: str, tmp_path: Path) -> None:
    model = make_model("qwen2", tmp_path / name)
    shutil.rmtree(model / "additional_chat_templates")
    make_tokenizer(name, model)
    main(
        ExportArguments(
            model, format="gguf", output=tmp_path / "model.gguf", check_python=_python()
        )
    )


@pytest.mark.slow
def test_llama_cpp_agrees_with_a_model_trained_here(model_dir: Path, tmp_path: Path) -> None:
    main(
        ExportArguments(
            model_dir, format="gguf", output=tmp_path / "model.gguf", check_python=_python()
        )
    )
