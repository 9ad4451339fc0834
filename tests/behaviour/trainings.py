"""Trainings of tiny models, and models that are made of them: weights, checkpoints, figures, files.

experiments/NAME/0    by fst train
models/NAME           averaged, whitened, and one with a chat template
"""

import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tests.behaviour.commands import fst, fst_words, running, wait_until
from tests.behaviour.data import ROW_TASKS
from tests.behaviour.facts import (
    Facts,
    checkpoint_facts,
    curves,
    hash_files,
    hash_weights,
    plain,
    read_json,
    read_json_lines,
)
from tests.behaviour.steps import Step

LANGUAGE_MODEL = "adamw"
INTERRUPTED, UNINTERRUPTED, RESUMED = "interrupted", "dropout", "resumed"
CHAT_TEMPLATE = (
    "{% for message in messages %}[DOC_START]{{ message['role'] }}: {{ message['content'] }}[DOC_END]"
    "{% endfor %}{% if add_generation_prompt %}[DOC_START]assistant:{% endif %}"
)
_TERMINATED = 128 + 15
_MAX_TRIES = 5
_LOOK_SECONDS = 0.005
Options = Mapping[str, object]
_SHARED: Options = {
    "experiments_root": "experiments",
    "max_epochs": -1,
    "num_warmup_steps": 5,
    "val_check_interval": 10,
    "log_every_n_steps": 5,
    "seed": 3,
    "compile": "never",
    "precision": "32",
    "accelerator": "cpu",
    "devices": 1,
    "batch_size": 8,
}
_CAUSAL: Options = {
    **_SHARED,
    "dataset_dir": "datasets/main",
    "model_config": "tiny",
    "learning_rate": 1e-2,
    "max_steps": 20,
    "num_generated_samples": 0,
}
_DROPOUT: Options = {
    **_CAUSAL,
    "model_config": "gpt2.json",
    "val_check_interval": 20,
    "dropout": 0.1,
    "ema_decay": 0.8,
    "accumulate_grad_batches": 2,
    "optimizer": "muon",
}
_INTERRUPTED: Options = {
    **_DROPOUT,
    "experiment_name": INTERRUPTED,
    "num_generated_samples": 2,
    "checkpoint_every_n_minutes": 0,
}
_CAUSAL_TRAININGS: Mapping[str, Options] = {
    LANGUAGE_MODEL: {**_CAUSAL, "max_steps": 60, "val_check_interval": 20},
    "muon": {**_CAUSAL, "optimizer": "muon", "lr_schedule": "linear"},
    "packed": {**_CAUSAL, "batching": "packed"},
    "averaged_weights": {**_CAUSAL, "ema_decay": 0.9},
    "accumulated": {**_CAUSAL, "accumulate_grad_batches": 2, "num_cycles": 2},
    "unlikelihood": {**_CAUSAL, "unlikelihood_alpha": 0.5},
    UNINTERRUPTED: _DROPOUT,
    # What the engine in PyTorch generates with.
    "other": {
        **_CAUSAL,
        "model_config": "qwen2.json",
        "precision": "bf16",
        "batching": "concatenated",
        "lr_schedule": "wsd",
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
        "activation_checkpointing": "true",
    },
}
_MODEL_CONFIGS: dict[str, dict[str, object]] = {
    "gpt2.json": {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 2,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),
    },
    "qwen2.json": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
_ROWS: Options = {
    **_SHARED,
    "model_config": "tiny",
    "learning_rate": 2e-3,
    "max_steps": 15,
    "max_length": 64,
    "doc_stride": 16,
    "vocab_size": 400,
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "true"),
}
_OWN_OF_TASK: dict[str, Options] = {
    "sequence_classification": {"metric_for_best_model": "accuracy"},
    # Enough that some questions get an answer.
    "span_selection": {
        "learning_rate": 5e-3,
        "max_steps": 20,
        "max_length": 128,
        "doc_stride": 32,
        "vocab_size": 1000,
    },
}
# How texts are sampled at validations: nothing is left to defaults.
_SAMPLE_PARAMETERS = {
    "prompts": ["", "The reader"],
    "max_new_tokens": 24,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "num_samples": 2,
    "seed": 5,
}


def training_steps() -> list[Step]:
    """Of trainings and of the models that are made of them."""
    causal = [
        Step(f"train/{name}", partial(_train, name=name, options=options), ("dataset/main",))
        for name, options in _CAUSAL_TRAININGS.items()
    ]
    rows = [
        Step(f"train/{task}", partial(_train_on_rows, task=task), (f"collected/{task}",))
        for task in ROW_TASKS
    ]
    similar = ("train/masked_lm", "collected/sentence_embedding")
    return [
        *causal,
        Step(f"train/{INTERRUPTED}", _interrupt, ("dataset/main",)),
        Step(f"train/{RESUMED}", _resume, _train_names(INTERRUPTED, UNINTERRUPTED), goes_on=True),
        Step("train/masked_lm", _train_masked, ("dataset/main",)),
        *rows,
        Step("train/simcse", _train_simcse, similar),
        Step("models/averaged", _average, _train_names(LANGUAGE_MODEL)),
        Step("models/whitened", _whiten, similar),
        Step("models/chat", _make_chat_model, _train_names(LANGUAGE_MODEL)),
    ]


def _train_names(*names: str) -> tuple[str, ...]:
    return tuple(f"train/{name}" for name in names)


def _train(work: Path, name: str, options: Options) -> Facts:
    _write_model_configs(work)
    printed = fst(work, "train", *_words({**options, "experiment_name": name}))
    return {"printed": printed, **_experiment_facts(work / "experiments" / name / "0")}


def _words(options: Options) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _write_model_configs(work: Path) -> None:
    for name, content in _MODEL_CONFIGS.items():
        if not (work / name).exists():
            (work / name).write_text(json.dumps(content), encoding="utf-8")


def _train_masked(work: Path) -> Facts:
    masked = {"task": "masked_lm", "whole_word_masking": "true", "mask_probability": 0.3}
    return _train(work, "masked_lm", {**_CAUSAL, **masked, "metric_for_best_model": "accuracy"})


def _train_on_rows(work: Path, task: str) -> Facts:
    own = {"task": task, "dataset_dir": f"rows/{task}", **_OWN_OF_TASK.get(task, {})}
    return _train(work, task, {**_ROWS, **own})


def _train_simcse(work: Path) -> Facts:
    own = {
        "task": "sentence_embedding",
        "dataset_dir": "rows/sentence_embedding",
        "embedding_loss": "simcse",
        "pooling": "cls",
        "simcse_temperature": 0.1,
        "model_path": "experiments/masked_lm/0/model",
    }
    return _train(work, "simcse", {**_ROWS, **own})


def _interrupt(work: Path) -> Facts:
    """A training that a signal ends before its first validation; when it ends by itself first, another."""
    _write_model_configs(work)
    directory = work / "experiments" / INTERRUPTED
    words = fst_words("train", *_words(_INTERRUPTED))
    checkpoint = directory / "0" / "checkpoints" / "last.ckpt"
    for _ in range(_MAX_TRIES):
        shutil.rmtree(directory, ignore_errors=True)
        with running(work, words) as training:
            wait_until(
                lambda run=training: checkpoint.exists() or run.is_over or None,  # type: ignore[misc]
                "checkpoint",
                _LOOK_SECONDS,
            )
            code = training.stop()
        if code == _TERMINATED and not (directory / "0" / "generated.jsonl").exists():
            parameters = directory / "0" / "text_generator_params.json"
            parameters.write_text(json.dumps(_SAMPLE_PARAMETERS), encoding="utf-8")
            return {"exit_code": code}
    raise RuntimeError(f"no training could be interrupted: {training.log[-1000:]}")


def _resume(work: Path) -> Facts:
    """Go on with a copy of the interrupted training; its weights are those of the uninterrupted one."""
    target = work / "experiments" / RESUMED
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work / "experiments" / INTERRUPTED, target)
    options = {**_INTERRUPTED, "experiment_name": RESUMED, "resume": "last"}
    printed = fst(work, "train", *_words(options))
    facts = _experiment_facts(target / "0")
    whole = _experiment_facts(work / "experiments" / UNINTERRUPTED / "0")
    same = ("weights", "checkpoint/weights", "checkpoint/optimizers", "summary")
    # It has two event files, whose points depend on where it was interrupted.
    del facts["curves"]
    if others := [name for name in same if facts[name] != whole[name]]:
        raise RuntimeError(f"resumed, these are not as uninterrupted: {', '.join(others)}")
    return {"printed": printed, **facts}


def _experiment_facts(directory: Path) -> Facts:
    """What a training left behind."""
    generated = directory / "generated.jsonl"
    checkpoint = checkpoint_facts(directory / "checkpoints" / "last.ckpt")
    return {
        **{f"checkpoint/{name}": value for name, value in checkpoint.items()},
        "summary": read_json(directory / "summary.json"),
        "curves": curves(directory),
        "files": sorted(
            re.sub(r"tfevents\..*", "tfevents", str(path.relative_to(directory)))
            for path in directory.rglob("*")
        ),
        "texts": [
            [line["step"], line["seed"], line["text"]]
            for line in (read_json_lines(generated) if generated.exists() else [])
        ],
        **{
            path.stem: read_json(path) if path.suffix == ".json" else read_json_lines(path)
            for path in sorted(directory.glob("*_*.json*"))
            if path.stem in ("eval_results", "test_results", "test_predictions")
        },
        **_model_facts(directory / "model"),
    }


def _model_facts(directory: Path) -> Facts:
    """What a model directory holds."""
    return {
        "weights": hash_weights(directory),
        "configs": {
            str(path.relative_to(directory)): read_json(path)
            for path in sorted(directory.rglob("*.json"))
            if "tokenizer" not in path.name
        },
        "tokenizer": hash_files(directory, "*tokenizer*"),
        "model_files": sorted(str(path.relative_to(directory)) for path in directory.rglob("*")),
        "card": _card(directory / "README.md"),
    }


def _card(path: Path) -> list[str]:
    """The sections of a model card, without how to use it, which names modules, and without options."""
    if not path.exists():
        return []
    sections = path.read_text(encoding="utf-8").split("\n## ")
    return [one for one in sections if not one.startswith(("Use", "Training"))]


def _average(work: Path) -> Facts:
    checkpoints = Path("experiments", LANGUAGE_MODEL, "0", "checkpoints")
    words = (checkpoints / "last.ckpt", checkpoints / "previous.ckpt")
    printed = fst(work, "average_checkpoints", *words, "--output_dir", "models/averaged")
    return {"printed": printed, **_model_facts(work / "models" / "averaged")}


def _whiten(work: Path) -> Facts:
    words = ("experiments/masked_lm/0", "rows/sentence_embedding/train.jsonl", "--device", "cpu")
    more = ("--num_dimensions", "16", "--output_dir", "models/whitened")
    printed = fst(work, "whiten", *words, *more)
    return {"printed": printed, **_model_facts(work / "models" / "whitened")}


def _make_chat_model(work: Path) -> Facts:
    target = work / "models" / "chat"
    shutil.copytree(work / "experiments" / LANGUAGE_MODEL / "0" / "model", target)
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return {"files": plain(sorted(path.name for path in target.iterdir()))}
