"""Model directories for other programs: adapters merged, safetensors, a chosen type of weights."""

import logging
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from full_stack_transformer.arguments.exporting import ExportArguments
from full_stack_transformer.arguments.models import ImportModelArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.exporting.checking import (
    compare_continuations,
    compare_ids,
    compare_templates,
    in_type,
    questions_for,
)
from full_stack_transformer.exporting.source import Source, open_source
from full_stack_transformer.model_sources.import_model import import_model
from full_stack_transformer.modelling.model_files import read_config
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.modelling.pretrained import read_start
from full_stack_transformer.tasks.opening import task_class_of

logger = logging.getLogger(__name__)

_NUM_GREEDY_TOKENS = 16


def write_huggingface(arguments: ExportArguments) -> None:
    """Write the directory, checked by transformers.

    Raises:
        UsageError: a checkpoint, whose weights are in no directory.
        ModelError: there is no model, or transformers computes something else with the copy.
    """
    if arguments.model.suffix == ".ckpt":
        raise UsageError(
            f"{arguments.model} is a checkpoint; export its experiment, or average it with others first: fst "
            "average_checkpoints"
        )
    place = find_model(arguments.model, arguments.base)
    read_config(place.directory)
    generates = task_class_of(place.directory).generates

    def check(directory: Path) -> None:
        if arguments.check and generates:
            _check(open_source(arguments), directory, arguments)

    import_model(
        ImportModelArguments(
            str(place.own),
            models_root=arguments.output.parent,
            model_name=arguments.output.name,
            base=str(place.directory) if place.adapter is not None else None,
            dtype=arguments.dtype,  # type: ignore[arg-type]
        ),
        finish=check,
    )
    logger.info("serve it: vllm serve %s", arguments.output)


def _check(source: Source, directory: Path, arguments: ExportArguments) -> None:
    engine = f"transformers {transformers.__version__}"
    asked = questions_for(source, arguments)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    ids = [
        tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        for text in asked.texts
    ]
    dtype = read_start(str(directory)).dtype or "float32"
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False
    ).eval()
    continuations = [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=_NUM_GREEDY_TOKENS,
            repetition_penalty=1.0,
        )[0, len(prompt) :].tolist()
        for prompt in asked.prompts
    ]
    backbone = in_type(source.backbone, dtype)
    lines = [
        compare_ids(source, asked.texts, ids, engine),
        compare_continuations(backbone, asked.prompts, continuations, dtype, engine),
    ]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    lines.append(compare_templates(source, template, engine))
    for line in lines:
        logger.info("checked with %s: %s", engine, line)
