"""Which tasks there are, which one a saved model is for, and opening a model with the head of its task."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.modelling.backbones import load_backbone
from full_stack_transformer.modelling.embedding.head import MODULES_FILE_NAME
from full_stack_transformer.modelling.model_directory import (
    backbone_of_checkpoint,
    find_model_directory,
    resolve_device,
)
from full_stack_transformer.tasks.task import Task, TaskOptions
from full_stack_transformer.tokenization.transformers_tokenizer import open_tokenizer

CAUSAL_LM, SENTENCE_EMBEDDING = "causal_lm", "sentence_embedding"
# name -> module of this room, class; and how the name of a model's class ends that has such a head.
TASKS: dict[str, tuple[str, str, str]] = {
    "masked_lm": ("masked_lm", "MaskedLm", "ForMaskedLM"),
    "sequence_classification": (
        "sequence_classification",
        "SequenceClassification",
        "ForSequenceClassification",
    ),
    "multiple_choice": ("multiple_choice", "MultipleChoice", "ForMultipleChoice"),
    "span_selection": ("span_selection", "SpanSelection", "ForQuestionAnswering"),
    "token_labelling": ("token_labelling", "TokenLabelling", "ForTokenClassification"),
    SENTENCE_EMBEDDING: ("sentence_embedding", "SentenceEmbedding", "Model"),
}
_DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class OpenedTask:
    """A model that is ready to predict, in evaluation mode."""

    name: str
    """Of the task."""
    task: Task
    backbone: Backbone
    description: dict[str, Any]


def task_class(name: str) -> type[Task]:
    """The class of a task: one of this room by its name, or my_module.MyTask.

    Raises:
        UsageError: there is none.
    """
    module, cls = TASKS[name][:2] if name in TASKS else ("", "")
    if module:
        found = getattr(importlib.import_module(f"full_stack_transformer.tasks.{module}"), cls)
    else:
        found = import_by_path(name, "a task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UsageError(
            f"{name} is no task; expected one of {', '.join(TASKS)} or my_module.MyTask"
        )
    return found


def import_by_path(path: str, what: str) -> Any:
    """What `my_module.MyClass` names.

    Raises:
        UsageError: it cannot be imported.
    """
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{path!r} should name {what}, my_module.MyClass: {error}") from error


def head_of(class_name: str) -> str | None:
    """The task whose head the name of a model's class tells of; None of a body, and of what is not known."""
    heads = {ending: name for name, (_, _, ending) in TASKS.items() if ending.startswith("For")}
    return next((name for ending, name in heads.items() if class_name.endswith(ending)), None)


def task_name_of(directory: Path) -> str:
    """The task of a model directory, by what its config says of the model's class.

    With the files of sentence-transformers it embeds, whatever head the weights still hold.

    Raises:
        ModelError: it says nothing that is known.
    """
    if (directory / MODULES_FILE_NAME).is_file():
        return SENTENCE_EMBEDDING
    config = _read(directory / "config.json")
    description = _read(directory / "description.json")
    architecture = (config.get("architectures") or [""])[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        # Choices are scored by the likelihood that a causal model gives them, which needs no head.
        is_choosing = description.get("task") == "multiple_choice"
        return "multiple_choice" if is_choosing else CAUSAL_LM
    for name, (_, _, ending) in TASKS.items():
        if architecture.endswith(ending):
            return name
    raise ModelError(
        f"{directory / 'config.json'} names the class {architecture!r}, which has a head of no task here: "
        f"{CAUSAL_LM}, {', '.join(TASKS)}"
    )


def open_task(
    path: Path,
    *,
    name: str | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> OpenedTask:
    """Open a model of any task but causal_lm; see `find_model_directory` for what `path` may be.

    Args:
        path: where the model is.
        name: a task that the model can do beside its own, such as multiple_choice by a causal model.
        device: where to compute.
        dtype: of the weights.

    Raises:
        ModelError: there is none, it lacks tensors, or tokenizer and weights do not fit.
    """
    directory = find_model_directory(path)
    name = name or task_name_of(directory)
    if name == CAUSAL_LM:
        raise ModelError(f"{directory} is a causal language model; expected one of another task")
    description = _read(directory / "description.json")
    cls = task_class(description.get("task_class") or name)
    if "model_class" in description:  # its module registers it with transformers
        import_by_path(description["model_class"], "a model")
    config = _config(directory)
    tokenizer = open_tokenizer(directory)
    options = TaskOptions(
        max_length=_max_length(tokenizer.model_max_length, config),
        **description.get("task_options", {}),
    )
    task = cls.open(config, tokenizer, options)
    model_class = cls.backbone_class(config)
    if path.suffix == ".ckpt":
        backbone = backbone_of_checkpoint(path, directory, dtype, model_class)
    else:
        backbone = load_backbone(str(directory), dtype=dtype, model_class=model_class)
    num_embeddings = backbone.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ModelError(
            f"{directory}: the tokenizer has {len(tokenizer):,} tokens, the model {num_embeddings:,} "
            "embeddings; they do not belong together"
        )
    where = resolve_device(device)
    task.read_directory(directory, where)
    backbone = backbone.to(where).eval()
    return OpenedTask(name, task, backbone, description)


def _config(directory: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{directory / 'config.json'} cannot be used: {reason}") from error
    return config


def _max_length(of_tokenizer: int, config: PretrainedConfig) -> int:
    """What both allow; a tokenizer without a limit says 1e30."""
    of_model = getattr(config, "max_position_embeddings", None) or _DEFAULT_MAX_LENGTH
    return int(min(of_tokenizer, of_model))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} should hold JSON, but is damaged: {error}") from error
    return content if isinstance(content, dict) else {}
