"""Whatever is given as a model: what it is, where, and what to type; never a traceback, never nonsense."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from full_stack_transformer.command_line import run
from tests.conftest import RunFst
from tests.serving.tiny_model import make_tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
BERT = BertConfig(
    vocab_size=280,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
)
Spoil = Callable[[Path], Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("files"))


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "model-a"))


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence of a command that is refused."""

    def refused(*words: str | Path) -> str:
        capsys.readouterr()
        assert run(list(map(str, words))) == 1
        out, err = capsys.readouterr()
        sentences = [line for line in err.splitlines() if line.startswith("fst: ")]
        assert len(sentences) == 1
        assert out == ""
        assert "Traceback" not in err
        return sentences[0]

    return refused


def configure(**fields: object) -> Spoil:
    """Change fields of config.json."""

    def spoil(model: Path) -> None:
        content = json.loads((model / CONFIG).read_text()) | fields
        (model / CONFIG).write_text(json.dumps(content))

    return spoil


def write(name: str, content: str | bytes) -> Spoil:
    """Replace a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda model: (model / name).write_bytes(data)


def rename(name: str) -> Spoil:
    """The weights under another name."""
    return lambda model: (model / WEIGHTS).rename(model / name)


def remove(*names: str) -> Spoil:
    """Without these files."""

    def spoil(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return spoil


def add(**tensors: torch.Tensor) -> Spoil:
    """More tensors; `__` stands for a dot."""

    def spoil(model: Path) -> None:
        more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(load_file(model / WEIGHTS) | more, model / WEIGHTS, metadata={"format": "pt"})

    return spoil


def shard(*removed: str) -> Spoil:
    """The weights in six files, without those that are named."""

    def spoil(model: Path) -> None:
        backbone = AutoModelForCausalLM.from_pretrained(model)
        (model / WEIGHTS).unlink()
        backbone.save_pretrained(model, max_shard_size="100KB")
        remove(*removed)(model)

    return spoil


def only(name: str, content: str = "{}") -> Spoil:
    """A directory with nothing but this file."""

    def spoil(model: Path) -> None:
        shutil.rmtree(model)
        (model / name).parent.mkdir(parents=True)
        (model / name).write_text(content)

    return spoil


def cut(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-64])


def dangling(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to("../blobs/0")


def prefixed(model: Path) -> None:
    weights = {f"_orig_mod.{name}": one for name, one in load_file(model / WEIGHTS).items()}
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})


def original(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "original").mkdir()


ADAPTER = '{"peft_type": "LORA", "base_model_name_or_path": "makers/base"}'
QUANTISED: dict[str, dict[str, object]] = {
    "bitsandbytes": {"load_in_4bit": True},
    "gptq": {"bits": 4},
    "awq": {"bits": 4},
    "fp8": {"weight_block_size": [128, 128]},
    "compressed-tensors": {"format": "pack-quantized"},
    "hqq": {},
    "gguf": {},
}
# what was done to a model -> words of the sentence
SPOILT: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "more layers in the file": (
        configure(num_hidden_layers=1),
        ("9 tensors", "model.layers.1.", "names 1 layers, the weights have 2"),
    ),
    "fewer layers in the file": (
        configure(num_hidden_layers=3),
        ("lack 9 tensors", "model.layers.2."),
    ),
    "another width": (
        configure(intermediate_size=128),
        ("down_proj.weight has the shape (64, 192)", "(64, 128)"),
    ),
    "another vocabulary": (configure(vocab_size=290), ("model.embed_tokens.weight", "(290, 64)")),
    "biases that the config does not use": (
        add(model__layers__0__self_attn__q_proj__bias=torch.zeros(64)),
        ("model.layers.0.self_attn.q_proj.bias", "config.json does not use"),
    ),
    **{
        f"quantised: {method}": (
            configure(quantization_config={"quant_method": method} | fields),
            (
                "is quantised with " + method,
                "fst import_model",
                "fst serve DIRECTORY --weights_dtype",
            ),
        )
        for method, fields in QUANTISED.items()
    },
    "quantised by MLX": (configure(quantization={"bits": 4}), ("MLX (4 bits)",)),
    "quantised beside the config": (write("quantize_config.json", "{}"), ("GPTQ",)),
    "quantised without a word": (
        add(model__layers__0__mlp__up_proj__qweight=torch.zeros(2, 2, dtype=torch.int32)),
        ("quantised weights (model.layers.0.mlp.up_proj.qweight, I32)",),
    ),
    "an adapter": (
        only("adapter_config.json", ADAPTER),
        ("needs its base makers/base", "--base", "fst import_model makers/base"),
    ),
    "an adapter beside a model": (
        write("adapter_config.json", ADAPTER),
        ("makers/base", "remove", "adapter_config.json"),
    ),
    "a directory with a GGUF": (
        only("small.Q4.gguf", "GGUF"),
        ("a GGUF file", "fst import_model", "small.Q4.gguf, then name data/models/small.Q4"),
    ),
    "a GGUF beside a config": (rename("a.gguf"), ("a GGUF file", "fst import_model")),
    "code of its own": (
        configure(model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
        ("auto_map: modeling_own.Own", "never run"),
    ),
    "TensorFlow": (rename("tf_model.h5"), ("weights of TensorFlow (tf_model.h5)", "hf download")),
    "Flax": (rename("flax_model.msgpack"), ("weights of Flax",)),
    "ONNX": (rename("model.onnx"), ("an ONNX export (model.onnx)",)),
    "renamed weights": (rename("b.safetensors"), ("mv ", "b.safetensors", "model.safetensors")),
    "the format of its makers": (
        only("original/consolidated.00.pth"),
        ("in the format of its makers", "--exclude 'original/*'"),
    ),
    "makers' weights beside a config": (
        original,
        ("the folder original/", "hf download"),
    ),
    "a checkpoint of another program": (only("epoch=1.ckpt"), ("epoch=1.ckpt", "save_pretrained")),
    "a training without a model": (
        only("arguments.json"),
        ("has written no model yet", "fst train --resume"),
    ),
    "a Trainer's output": (only("checkpoint-9/config.json"), ("name one, such as", "checkpoint-9")),
    "a shard is missing": (
        shard("model-00002-of-00006.safetensors"),
        ("lacks 1 of the 6 files", "model-00002-of-00006.safetensors"),
    ),
    "shards without their list": (
        shard("model.safetensors.index.json"),
        ("without model.safetensors.index.json", "hf download"),
    ),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        ("has no tokenizer", "hf download"),
    ),
    "half a tokenizer": (remove("tokenizer.json"), ("tokenizer.json",)),
    "empty weights": (write(WEIGHTS, ""), ("model.safetensors is empty",)),
    "no tensors": (lambda model: save_file({}, model / WEIGHTS), ("holds no tensors",)),
    "weights cut off": (cut, ("is cut off", "bytes are there")),
    "a page in place of weights": (write(WEIGHTS, "<html>" * 20), ("starts with b'<html>",)),
    "a pointer of Git LFS": (write(WEIGHTS, POINTER), ("a pointer of Git LFS", "lfs pull")),
    "a pointer as tokenizer": (write("tokenizer.json", POINTER), ("tokenizer.json is a pointer",)),
    "config.json is no JSON": (write(CONFIG, "{"), ("config.json should be a JSON object",)),
    "config.json is a list": (write(CONFIG, "[1]"), ("a JSON object, found list",)),
    "no model_type": (write(CONFIG, '{"a": 1}'), ("names no model_type", "found a")),
    "a misspelt model_type": (configure(model_type="lama"), ("'lama'", "did you mean 'llama'")),
    "a field of another type": (configure(hidden_size="x"), ("does not describe a llama model",)),
    "a broken link": (dangling, ("the broken link model.safetensors -> ../blobs/0",)),
    "another file as pickle": (
        lambda model: [
            rename("pytorch_model.bin")(model),
            write("pytorch_model.bin", "junk")(model),
        ],
        ("pytorch_model.bin is no file of PyTorch", "b'junk'"),
    ),
    "heads that do not divide the width": (
        configure(num_attention_heads=3),
        ("does not describe a llama model", "multiple"),
    ),
    "a prefix in the file": (prefixed, ("lack 21 tensors", "others such as _orig_mod.model.")),
    "weights alone": (remove(CONFIG), ("weights (model.safetensors) without config.json",)),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_what_cannot_be_opened_is_named(
    spoil: Spoil, words: tuple[str, ...], model: Path, refusal: Callable[..., str]
) -> None:
    spoil(model)
    sentence = refusal("generate", model, "--prompt", "the")
    assert str(model) in sentence
    for word in words:
        assert word in sentence


def test_what_is_not_of_the_body_is_only_said(
    model: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Other heads, and buffers that older versions saved; code is not run, where a class is known."""
    configure(auto_map={"AutoModelForCausalLM": "modeling_own.Own"}, quantization_config=None)(
        model
    )
    add(
        score__weight=torch.zeros(2, 64),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4),
        model__layers__0__attn__masked_bias=torch.zeros(1),
        model__embeddings__position_ids=torch.zeros(1, 8),
    )(model)
    shard()(model)
    caplog.set_level("INFO")
    assert run(["generate", str(model), "--prompt", "the", "--max_new_tokens", "2"]) == 0
    assert "code of its own (auto_map), which is never run" in caplog.text


def test_unused_heads_are_logged(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(score__weight=torch.zeros(2, 64))(model)
    caplog.set_level("INFO")
    assert run(["generate", str(model), "--prompt", "the", "--max_new_tokens", "2"]) == 0
    assert "tensors of other heads are not used: score.weight" in caplog.text


def test_a_pickled_model_opens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(model), "--prompt", "the", "--temperature", "0"]
    assert run(command) == 0
    expected = capsys.readouterr().out
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    assert run(command) == 0
    assert capsys.readouterr().out == expected


def as_model(backbone: PreTrainedModel, trained: Path, target: Path) -> Path:
    """A model directory with the tokenizer of another one."""
    backbone.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, target)
    return target


def test_encoders_do_not_generate(
    trained: Path, tmp_path: Path, dataset_dir: Path, refusal: Callable[..., str]
) -> None:
    """transformers opens them as if they did, and a training would see the tokens that it is to predict."""
    masked = as_model(BertForMaskedLM(BERT), trained, tmp_path / "masked")
    classes = as_model(BertForSequenceClassification(BERT), trained, tmp_path / "classes")
    bare = as_model(BertModel(BERT), trained, tmp_path / "bare")
    sentence = refusal("generate", masked, "--prompt", "the")
    assert "BertForMaskedLM, which fills in masked words" in sentence
    assert f"fst serve {masked}" in sentence
    assert "classifies texts" in refusal("generate", classes, "--prompt", "the")
    assert f"fst serve {bare}" in refusal("generate", bare, "--prompt", "the")
    assert "has no mask token" in refusal("evaluate", masked, dataset_dir)
    assert "is measured on labelled rows" in refusal("evaluate", bare, dataset_dir)
    start = ("train", "--dataset_dir", dataset_dir, "--experiments_root", tmp_path / "x")
    assert "cannot continue texts" in refusal(*start, "--model_path", masked)
    assert list(tmp_path.glob("x/*/*")) == []


def test_encoder_decoders_are_named(
    trained: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    config = T5Config(vocab_size=280, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = as_model(T5ForConditionalGeneration(config), trained, tmp_path / "t5")
    texts = tmp_path / "texts.txt"
    texts.write_text("a\nb\n")
    for words in (
        ("generate", model, "--prompt", "the"),
        ("evaluate", model, texts),
        ("serve", model),
        ("whiten", model, texts, "--output_dir", tmp_path / "w"),
    ):
        sentence = refusal(*words)
        assert "an encoder-decoder (T5ForConditionalGeneration)" in sentence
        assert f"AutoModelForSeq2SeqLM.from_pretrained('{model}')" in sentence


def test_models_of_pictures_are_named(
    trained: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
    )
    model = as_model(ViTModel(config), trained, tmp_path / "pictures")
    (tmp_path / "texts.txt").write_text("a\nb\n")
    sentence = refusal("whiten", model, tmp_path / "texts.txt", "--output_dir", tmp_path / "w")
    assert "ViTModel, which reads other things than texts" in sentence


def test_other_directories_of_ours_are_named(
    trained: Path, dataset_dir: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    for place in (dataset_dir, dataset_dir.parent):
        sentence = refusal("serve", place)
        assert (
            f"a dataset directory; train a model on it: fst train --dataset_dir {dataset_dir}"
            in (sentence)
        )
    experiment = tmp_path / "books" / "1"
    shutil.copytree(trained, experiment / "model")
    assert f"the experiments 1; name one, such as {experiment}" in refusal(
        "generate", experiment.parent, "-p", "a"
    )
    assert f"--model_path {experiment}/model" in refusal(
        "train", "--dataset_dir", dataset_dir, "--model_path", experiment
    )
    sentence = refusal("train", "--dataset_dir", trained, "--experiments_root", tmp_path / "x")
    assert "is a model directory, not a dataset directory; make one with the tokenizer" in sentence
    assert "is a model directory" in refusal("verify_dataset", trained)
    (tmp_path / "last.ckpt").write_bytes(b"")
    assert "a checkpoint without its experiment" in refusal("generate", tmp_path / "last.ckpt")


def test_a_name_of_the_hub_is_to_be_downloaded(refusal: Callable[..., str]) -> None:
    sentence = refusal("generate", "makers/small-model", "--prompt", "a")
    assert "makers/small-model is no path here, and the hub cannot be reached" in sentence
    assert "fst import_model makers/small-model" in sentence
    sentence = refusal("generate", "small-model", "--prompt", "a")
    assert "fst import_model small-model, then name data/models/small-model" in sentence


def test_the_tokenizer_of_something_else_is_named(
    model: Path, dataset_dir: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a\n[END_OF_DOCUMENT]\n" * 9)
    words: tuple[str | Path, ...] = (
        "prepare_dataset",
        "--documents_train_file",
        text,
        "--documents_valid_file",
        text,
    )
    words += ("--datasets_root", tmp_path / "sets", "--dataset_name", "x", "--tokenizer_path")
    assert f"--tokenizer_path {dataset_dir / 'tokenizer'}" in refusal(*words, dataset_dir)
    (model / "tokenizer.json").write_text(POINTER)
    assert "a pointer of Git LFS" in refusal(*words, model)
    remove("tokenizer.json")(model)
    (model / "tokenizer.model").touch()
    assert "convert tokenizer.model" in refusal(*words, model)
    only("a.gguf", "GGUF")(model)
    assert "a.gguf" in refusal(*words, model)
    assert not (tmp_path / "sets").exists()


def test_a_real_process_says_it_at_once(run_fst: RunFst, model: Path, tmp_path: Path) -> None:
    """Without torch, where a look at the files is enough."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"}
    write(WEIGHTS, POINTER)(model)
    for words in (
        ("generate", model, "--prompt", "a"),
        ("serve", model),
        ("evaluate", model, tmp_path),
        ("train", "--dataset_dir", tmp_path, "--model_path", model),
        ("whiten", model, tmp_path, "--output_dir", tmp_path / "w"),
        ("average_checkpoints", model, model, "--output_dir", tmp_path / "w"),
    ):
        done = run_fst(*words, env=environment)
        assert done.returncode == 1
        assert done.stderr.startswith(f"fst: {model / WEIGHTS} is a pointer of Git LFS")
        assert len(done.stderr.splitlines()) == 1
