"""The commands of a plan: only what this release has, and what it cannot do yet."""

import json
import shlex
from collections.abc import Iterator

from full_stack_transformer.arguments.planning import PlanArguments
from full_stack_transformer.planning.job import Job

_NAME = "planned"
_CONFIG_FILE = "planned_model.json"
# Above this a tokenizer is trained on a part of the documents: counting all words takes long, changes little.
_LARGE_CORPUS_TOKENS = 1e9
_SMALL_LEARNING_RATES = ((1e7, "2e-3"), (1e8, "1e-3"), (1e9, "6e-4"), (1e10, "3e-4"))
_LEAST_LEARNING_RATE = "1.5e-4"
# Hours of preparation on one machine from which on one asks for more machines.
_LONG_CORPUS_TOKENS = 1e11


def commands(arguments: PlanArguments, job: Job) -> list[str]:
    """Lines for a shell, in their order."""
    lines = []
    option = job.shape.option
    if not option:
        option = _CONFIG_FILE
        lines.append(f"echo {shlex.quote(json.dumps(job.shape.config()))} > {option}")
    dataset = f"data/datasets/{_NAME}"
    if arguments.dataset_dir is not None:
        dataset = str(arguments.dataset_dir)
    else:
        lines += _prepare(arguments, job)
    lines.append(_train(job, option, shlex.quote(dataset)))
    model = f"data/experiments/{_NAME}/0"
    num_tokens = min(job.num_generated_tokens, job.max_sample_length)
    lines.append(f"fst generate {model} --prompt 'Once upon a time' --max_new_tokens {num_tokens}")
    lines.append(f"fst serve {model}")
    return lines


def _prepare(arguments: PlanArguments, job: Job) -> Iterator[str]:
    files = [shlex.quote(str(path)) for path in arguments.documents_train_file] or ["DOCUMENTS"]
    named = " ".join(f"--documents_train_file {file}" for file in files)
    length = f"--max_sample_length {job.max_sample_length}"
    tokenizer = f"--vocab_size {job.shape.vocab_size}"
    if job.corpus_tokens > _LARGE_CORPUS_TOKENS:
        yield (
            f"fst prepare_dataset --documents_train_file PART_OF_THEM --dataset_name part "
            f"{tokenizer} {length} --validation_fraction 0.01"
        )
        tokenizer = "--tokenizer_path data/datasets/part/0/tokenizer"
    yield (
        f"fst prepare_dataset {named} --dataset_name {_NAME} {tokenizer} {length} "
        f"--validation_fraction {job.validation_fraction:.12f}".rstrip("0")
    )


def _train(job: Job, option: str, dataset: str) -> str:
    machines = job.machines
    words = [f"{_launcher(job)} train --dataset_dir {dataset} --experiment_name {_NAME}"]
    words.append(f"--model_config {option}")
    words.append(f"--batch_size {job.batch_size}")
    if job.accumulate_grad_batches > 1:
        words.append(f"--accumulate_grad_batches {job.accumulate_grad_batches}")
    words.append(f"--optimizer {job.optimizer} --learning_rate {_learning_rate(job)}")
    words.append(f"--max_epochs {job.max_epochs}")
    if job.max_epochs == 1:
        words.append(f"--val_check_interval {1 / job.num_validations:g}")
    if job.activation_checkpointing:
        words.append("--activation_checkpointing")
    if machines.gpu is not None:
        words.append("--accelerator gpu --precision bf16 --batching packed")
        words.append(f"--checkpoint_every_n_minutes {job.checkpoint_minutes:g}")
        if machines.num_devices > 1:
            words.append(f"--strategy {job.strategy}")
    return " ".join(words)


def _launcher(job: Job) -> str:
    """What starts a process for each device."""
    machines = job.machines
    if machines.num_devices == 1:
        return "fst"
    words = ["torchrun"]
    if machines.num_machines > 1:
        words.append(f"--nnodes {machines.num_machines}")
        words.append("--rdzv_backend c10d --rdzv_endpoint HOST:29400")
    words.append(f"--nproc_per_node {machines.devices_per_machine} -m full_stack_transformer")
    return " ".join(words)


def _learning_rate(job: Job) -> str:
    """That of AdamW for this size (Brown et al. 2020, table 2.1); a start, no result of a search."""
    size = job.shape.num_parameters
    return next((rate for most, rate in _SMALL_LEARNING_RATES if size < most), _LEAST_LEARNING_RATE)


def planned(job: Job) -> list[str]:
    """What this size wants and this release cannot do yet."""
    machines = job.machines
    found = []
    if machines.num_machines > 1:
        found.append(
            "training on several machines is written and was not tried on any: run the command on each of "
            "them, with the name of the first as HOST, the same directories on all"
        )
    if job.corpus_tokens > _LONG_CORPUS_TOKENS and not job.has_dataset:
        found.append(
            "preparation on several machines is written and was tried on two nodes of one machine: "
            "fst prepare_dataset --ray_address auto"
        )
    if machines.gpu is not None and 2 * job.shape.num_parameters > machines.gpu.memory_bytes:
        found.append(
            "a model that is larger than one device does not fit into fst serve; vLLM opens the same "
            "directory: docs/scaling.md"
        )
    return found
