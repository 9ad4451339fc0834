"""Time, cost, memory and disk of each stage of a job: from a measurement, or from published figures.

    seconds of training = start + tokens / rate + validations + checkpoints

Knows nothing of how it is shown.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from full_stack_transformer import machine
from full_stack_transformer.arguments.planning import PlanArguments
from full_stack_transformer.planning.job import OPTIMAL_TOKENS_PER_PARAMETER, Job, memory_of
from full_stack_transformer.planning.machines import Gpu
from full_stack_transformer.planning.measuring import Measurement, measure
from full_stack_transformer.planning.needs import (
    LIBRARY_BYTES,
    NUM_CHECKPOINTS,
    USABLE_FRACTION,
    cache_bytes_per_token,
    checkpoint_bytes,
    dataset_bytes,
    model_bytes,
    serving_memory,
)
from full_stack_transformer.planning.spent import Spent
from full_stack_transformer.planning.words import SECONDS_OF_A_YEAR, count, duration, size

# Of the peak, on one GPU. Published for large models: 0.46 (PaLM 540B, Chowdhery et al. 2022), 0.38 to 0.43
# (Llama 3 405B on 8,192 to 16,384 H100, Dubey et al. 2024, table 4), 0.44 to 0.52 (Megatron-LM on A100,
# Narayanan et al. 2021). Not measured with this stack: no GPU was at hand.
UTILIZATION = 0.4
# What each doubling of the devices keeps. An assumption: Llama 3 kept 0.41 / 0.43 from 8,192 to 16,384.
KEPT_PER_DOUBLING = 0.97
# One more forward pass beside one forward and two of backward.
RECOMPUTATION = 4 / 3
# Text a second that one machine prepares: docs/benchmarks.md, two cores, 100 MB.
PREPARE_BYTES_PER_SECOND = 60e6
BYTES_PER_TOKEN = 4.0
# Of a disk, for checkpoints of machines that are not measured.
DISK_BYTES_PER_SECOND = 1e9
# Of the bandwidth of a GPU's memory, when one text is generated: every weight is read for each token.
BANDWIDTH_UTILIZATION = 0.6
GPU_START_SECONDS = 60.0
# Compiling, in modelling/acceleration.py: seconds, and the speed after it with bf16 and with fp32.
_COMPILE_SECONDS = 50.0
_COMPILED_SPEED = {True: 1.13, False: 1.07}
# A forward pass, as a part of forward and backward.
_FORWARD_PART = 1 / 3
_PREPARE_MEMORY_BYTES = 0.3e9  # docs/benchmarks.md
_SECONDS_OF_A_MONTH = 30 * 86_400.0
# Muennighoff et al. 2023 (arXiv 2305.16264): up to four passes are nearly as good as new text.
_GOOD_EPOCHS = 4
_FEW_TOKENS_PER_PARAMETER = 5.0
# The distinct words of a text grow with about the root of its length (Heaps 1978), and merging with them.
_HEAPS = 0.5


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the plan; unknown values are None."""

    name: str
    seconds: float | None = None
    """None: it is a part of another stage."""
    processor_seconds: float | None = None
    """Of all cores, where it was measured."""
    cost: float | None = None
    memory_bytes: float | None = None
    """Of one device, or of the machine where that computes."""
    disk_bytes: float | None = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it."""

    job: Job
    stages: list[Stage]
    memory_limit_bytes: float | None
    """Of one device."""
    assumptions: list[str]
    warnings: list[str]
    measurement: Measurement | None

    @property
    def seconds(self) -> float:
        """Of all stages, one after the other."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def cost(self) -> float | None:
        """Of all stages; None without a price."""
        costs = [stage.cost for stage in self.stages if stage.cost is not None]
        return sum(costs) if costs else None

    @property
    def disk_bytes(self) -> float:
        """Of all stages."""
        return sum(stage.disk_bytes or 0.0 for stage in self.stages)


def make_plan(arguments: PlanArguments, job: Job) -> Plan:
    """The plan of a job; measures this machine where it shall run here.

    Raises:
        DocumentsError: the documents to measure with cannot be read.
        MachineError: memory is short for any training.
    """
    if job.machines.gpu is None:
        return _measured_plan(arguments, job)
    return _published_plan(arguments, job, job.machines.gpu)


def _measured_plan(arguments: PlanArguments, job: Job) -> Plan:
    found = measure(arguments, job.shape, job.max_sample_length)
    if job.documents_bytes is not None:
        tokens = job.documents_bytes / found.bytes_per_token * job.max_epochs
        job = replace(job, num_tokens=tokens)
    compiles = _compiles(job, found)
    limit = _memory_limit(found)
    needed = memory_of(job, bfloat16=found.bfloat16).total
    if found.is_same_shape and found.device == "cpu":
        needed = float(found.peak_bytes)
    context = found.tokens_per_sample
    scale = job.shape.flops_per_token(context) / found.shape.flops_per_token(context)
    larger = job.shape.num_parameters / found.shape.num_parameters
    speed = _COMPILED_SPEED[found.bfloat16] if compiles else 1.0
    steps = found.train_token * (job.num_tokens * scale / speed)
    validation = (
        found.validation_token * (job.validation_tokens * scale) + found.validation * larger
    )
    part = 1.0 if job.has_dataset else 1 - job.validation_fraction
    num_validations = job.num_validations_in(job.num_tokens * part / found.tokens_per_step)
    num_checkpoints = num_validations + int(steps.seconds / 60 / job.checkpoint_minutes)
    train = found.train_start + found.train_end + steps + validation * num_validations
    train += found.checkpoint * (larger * num_checkpoints)
    if compiles:
        train += Spent(_COMPILE_SECONDS, _COMPILE_SECONDS)
    token = found.generate_token * larger
    prepare, text = _measured_preparation(job, found)
    price = arguments.price_per_hour
    stages = _stages(
        job,
        spent=(prepare, train, found.generate_start + token * job.num_generated_tokens),
        price=(price, price, price),
        memory=(_PREPARE_MEMORY_BYTES, needed, LIBRARY_BYTES + model_bytes(job.shape)),
        text_bytes=text,
        tokens_per_sample=found.tokens_per_sample,
        remarks=(
            f"{size(1 / found.prepare_byte.seconds)}/s" if found.prepare_byte.seconds else "",
            f"{count(job.num_tokens / steps.seconds)} tokens/s",
            f"{count(1 / token.seconds)} tokens/s, one text at a time",
        ),
    )
    return Plan(
        job=job,
        stages=stages,
        memory_limit_bytes=limit,
        assumptions=[*_measured_assumptions(job, found, stages)],
        warnings=[*_warnings(job, stages, needed, limit)],
        measurement=found,
    )


def _compiles(job: Job, found: Measurement) -> bool:
    """Whether fst train would compile; what was measured is not compiled."""
    import torch

    from full_stack_transformer.modelling.acceleration import pays_to_compile

    flops = job.num_tokens * job.shape.flops_per_token(found.tokens_per_sample)
    return pays_to_compile(torch.device(found.device), flops=flops, minutes=None)


def _measured_preparation(job: Job, found: Measurement) -> tuple[Spent, float]:
    """Its time, and bytes of the documents; nothing of both for a dataset that is there."""
    text = job.corpus_tokens * found.bytes_per_token
    if job.has_dataset:
        return Spent(), 0.0
    part = text / found.sample_bytes
    tokenizer = found.counting * part + found.merging * part**_HEAPS
    return found.prepare_start + found.prepare_byte * text + tokenizer, text


def _memory_limit(found: Measurement) -> float | None:
    if found.device.startswith("cuda"):
        import torch

        return float(torch.cuda.get_device_properties(found.device).total_memory)
    total = machine.total_memory_bytes()
    return None if total is None else float(total)


def _measured_assumptions(job: Job, found: Measurement, stages: list[Stage]) -> Iterator[str]:
    cores = machine.num_cores()
    yield (
        f"measured here in {found.seconds:.0f} s with the commands' own code on {found.device}, {cores} "
        f"cores, load {found.load:.1f}: other work on the machine slows the job as it slowed this"
    )
    if found.load > cores:
        processor = sum(stage.processor_seconds or 0.0 for stage in stages)
        yield (
            f"the load is above the cores: the processor time of the job is {duration(processor)}, and with "
            "nothing else on the machine it would take that time divided by the cores in use"
        )
    if not found.is_same_shape:
        yield (
            f"a smaller model was tried ({found.shape.num_parameters:,} parameters), and its times "
            "multiplied by the arithmetic of a token (training) and by the size (generation)"
        )
    if _compiles(job, found):
        yield (
            f"torch.compile, which fst train chooses for a training this long, was not tried: "
            f"{_COMPILE_SECONDS:.0f} s and {_COMPILED_SPEED[found.bfloat16]:.2f} times the speed are assumed"
        )
    yield (
        f"{found.bytes_per_token:.2f} bytes of text a token and {found.tokens_per_sample:.0f} tokens a "
        "sample, as in the documents that were measured with"
    )


def _published_plan(arguments: PlanArguments, job: Job, gpu: Gpu) -> Plan:
    machines, shape = job.machines, job.shape
    utilization = arguments.utilization or UTILIZATION
    efficiency = KEPT_PER_DOUBLING ** math.log2(machines.num_devices)
    rate = machines.num_devices * gpu.flops * utilization * efficiency
    per_token = shape.flops_per_token(job.max_sample_length)
    steps = job.flops * (RECOMPUTATION if job.activation_checkpointing else 1.0) / rate
    validation = job.validation_tokens * per_token * _FORWARD_PART / rate
    checkpoint = checkpoint_bytes(shape, job.optimizer) / DISK_BYTES_PER_SECOND
    num_checkpoints = job.num_validations + int(steps / 60 / job.checkpoint_minutes)
    train = (
        GPU_START_SECONDS + steps + job.num_validations * validation + num_checkpoints * checkpoint
    )
    text = 0.0 if job.has_dataset else job.corpus_tokens * BYTES_PER_TOKEN
    tokens_per_second = BANDWIDTH_UTILIZATION * gpu.bytes_per_second / (2 * shape.num_parameters)
    serving = serving_memory(
        shape, max_length=job.max_sample_length, memory_bytes=gpu.memory_bytes, weight_bytes=2
    )
    price = gpu.price_per_hour if arguments.price_per_hour is None else arguments.price_per_hour
    needed = memory_of(job).total
    stages = _stages(
        job,
        spent=(
            Spent(text / PREPARE_BYTES_PER_SECOND),
            Spent(train),
            Spent(GPU_START_SECONDS + job.num_generated_tokens / tokens_per_second),
        ),
        price=(None, price * machines.num_devices, price),
        memory=(_PREPARE_MEMORY_BYTES, needed, serving.weights + LIBRARY_BYTES),
        text_bytes=text,
        tokens_per_sample=job.max_sample_length,
        remarks=(
            f"{PREPARE_BYTES_PER_SECOND / 1e6:.0f} MB/s on one machine without GPUs",
            f"{count(job.num_tokens / steps)} tokens/s",
            f"{count(tokens_per_second)} tokens/s, one text at a time; {serving.num_texts:,} texts of "
            f"{job.max_sample_length:,} tokens fit at once"
            if serving.num_texts
            else f"does not fit into one {gpu.name}",
        ),
    )
    is_assumed = arguments.price_per_hour is None
    assumptions = [
        f"{gpu.name}: {gpu.flops / 1e12:,.0f} TFLOP/s in bf16 and {gpu.bytes_per_second / 1e12:.2f} TB/s by "
        f"its data sheet, of which {utilization:.0%} and {BANDWIDTH_UTILIZATION:.0%} are used; "
        f"{efficiency:.0%} of it is kept on {machines.num_devices:,} devices ({KEPT_PER_DOUBLING:.0%} for "
        "each doubling). None of this was measured with this stack; expect from half to twice the time",
        f"{price:g} an hour for each {gpu.name}"
        + (", assumed; pass --price_per_hour" if is_assumed else ""),
        f"{BYTES_PER_TOKEN:g} bytes of text a token; preparation at the rate of two cores "
        f"(docs/benchmarks.md), and disks of {DISK_BYTES_PER_SECOND / 1e9:g} GB/s",
    ]
    return Plan(
        job=job,
        stages=stages,
        memory_limit_bytes=USABLE_FRACTION * gpu.memory_bytes,
        assumptions=assumptions,
        warnings=[*_warnings(job, stages, needed, USABLE_FRACTION * gpu.memory_bytes)],
        measurement=None,
    )


def _stages(
    job: Job,
    *,
    spent: tuple[Spent, Spent, Spent],
    price: tuple[float | None, float | None, float | None],
    memory: tuple[float, float, float],
    text_bytes: float,
    tokens_per_sample: float,
    remarks: tuple[str, str, str],
) -> list[Stage]:
    """The rows; tuples are of preparation, training and generation, prices those of an hour."""
    cost = [
        None if one is None else taken.seconds / 3600 * one
        for taken, one in zip(spent, price, strict=True)
    ]
    dataset = dataset_bytes(job.corpus_tokens, job.shape.vocab_size, tokens_per_sample)
    one = checkpoint_bytes(job.shape, job.optimizer)
    cache = cache_bytes_per_token(job.shape) / 1e3
    prepare = Stage(
        name="prepare",
        seconds=spent[0].seconds,
        processor_seconds=spent[0].processor_seconds or None,
        cost=cost[0],
        memory_bytes=memory[0],
        disk_bytes=text_bytes + dataset,
        remark=remarks[0],
    )
    return [
        *([] if job.has_dataset else [prepare]),
        Stage(
            name="train",
            seconds=spent[1].seconds,
            processor_seconds=spent[1].processor_seconds or None,
            cost=cost[1],
            memory_bytes=memory[1],
            disk_bytes=model_bytes(job.shape),
            remark=remarks[1],
        ),
        Stage(
            name="checkpoints",
            disk_bytes=NUM_CHECKPOINTS * one,
            remark=f"in the time of train; up to {NUM_CHECKPOINTS} of {size(one)} at once",
        ),
        Stage(
            name="generate",
            seconds=spent[2].seconds,
            processor_seconds=spent[2].processor_seconds or None,
            cost=cost[2],
            memory_bytes=memory[2],
            remark=f"{remarks[2]}; {cache:.3g} KB of keys and values a token",
        ),
    ]


def _warnings(job: Job, stages: list[Stage], needed: float, limit: float | None) -> Iterator[str]:
    """What is impossible or silly, and what to change."""
    gpu = job.machines.gpu
    where = "this machine" if gpu is None else f"one {gpu.name}"
    if limit is not None and needed > limit:
        yield (
            f"impossible: training needs {size(needed)} on a device, {where} has {size(limit)} for it. "
            f"Change: {_smaller(job)}"
        )
    total = sum(stage.seconds or 0.0 for stage in stages)
    if total > SECONDS_OF_A_YEAR:
        factor = total / _SECONDS_OF_A_MONTH
        if gpu is None:
            advice = "run it on GPUs (--machines 8xH100), or train a smaller model on fewer tokens"
        else:
            advice = (
                f"some {count(factor)} times as many devices, or a smaller model and fewer tokens: half of "
                "both takes a quarter of the time"
            )
        yield f"silly: it takes {duration(total)}. For a month: {advice}"
    ratio = job.tokens_per_parameter
    if ratio < _FEW_TOKENS_PER_PARAMETER:
        best = OPTIMAL_TOKENS_PER_PARAMETER
        better = math.sqrt(job.num_tokens * job.shape.num_parameters / best)
        yield (
            f"{ratio:.2g} tokens a parameter are few: for the same arithmetic {count(better)} parameters and "
            f"{count(best * better)} tokens give a lower loss"
        )
    if job.max_epochs > _GOOD_EPOCHS:
        yield (
            f"{job.max_epochs} passes over the same text: after {_GOOD_EPOCHS} another one teaches much "
            "less than new text (Muennighoff et al. 2023)"
        )
    disk = sum(stage.disk_bytes or 0.0 for stage in stages)
    if gpu is None and disk > (free := shutil.disk_usage(Path.cwd()).free):
        yield f"the disk is too small: {size(disk)} are needed, {size(free)} are free here"


def _smaller(job: Job) -> str:
    ways = []
    if not job.activation_checkpointing:
        ways.append("--activation_checkpointing")
    if job.batch_size > 1:
        ways.append("a smaller --batch_size")
    if job.optimizer == "adamw":
        ways.append("--optimizer muon")
    if job.machines.gpu is None:
        ways.append("GPUs (--machines 8xH100)")
    else:
        ways.append("more devices, which share the model")
    return ", ".join([*ways, "fewer --parameters"])
