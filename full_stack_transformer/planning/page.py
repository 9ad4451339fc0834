"""Shows a plan: as a page in plain words, and as JSON."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from full_stack_transformer.arguments.planning import PlanArguments
from full_stack_transformer.planning.commands import commands, planned
from full_stack_transformer.planning.job import OPTIMAL_TOKENS_PER_PARAMETER, Job, memory_of
from full_stack_transformer.planning.stages import Plan, Stage
from full_stack_transformer.planning.words import count, duration, size


def page(arguments: PlanArguments, plan: Plan) -> Iterator[str]:
    """The lines."""
    job = plan.job
    name = f"{count(job.shape.num_parameters)} parameters on {count(job.num_tokens)} tokens"
    yield f"Plan: {name}, on {job.machines.words}"
    yield ""
    yield from _rows(_job_rows(job))
    yield ""
    yield from _table(plan)
    yield ""
    yield "Memory of a device in training"
    yield from _rows(_memory_rows(plan))
    for title, lines in (
        ("Warnings", plan.warnings),
        ("What this rests on", plan.assumptions),
        ("Not yet", planned(job)),
    ):
        if lines:
            yield f"\n{title}"
            yield from (f"  - {line}" for line in lines)
    yield "\nCommands"
    yield from (f"  {line}" for line in commands(arguments, job))


def as_json(arguments: PlanArguments, plan: Plan) -> dict[str, Any]:
    """The same for programs: seconds, bytes, and the price's currency."""
    job, found = plan.job, plan.measurement
    memory = memory_of(job, bfloat16=found is None or found.bfloat16)
    return {
        "model": {
            **dataclasses.asdict(job.shape),
            "num_parameters": job.shape.num_parameters,
            "flops_per_token": job.shape.flops_per_token(job.max_sample_length),
        },
        "job": {
            "num_tokens": job.num_tokens,
            "corpus_tokens": job.corpus_tokens,
            "tokens_per_parameter": job.tokens_per_parameter,
            "flops": job.flops,
            "max_epochs": job.max_epochs,
            "max_sample_length": job.max_sample_length,
            "batch_size": job.batch_size,
            "accumulate_grad_batches": job.accumulate_grad_batches,
            "optimizer": job.optimizer,
            "activation_checkpointing": job.activation_checkpointing,
            "strategy": job.strategy,
        },
        "machines": {
            "name": job.machines.gpu.name if job.machines.gpu else "this",
            "num_machines": job.machines.num_machines,
            "devices_per_machine": job.machines.devices_per_machine,
        },
        "stages": {
            stage.name: {
                key: value
                for key, value in dataclasses.asdict(stage).items()
                if key not in ("name", "remark")
            }
            for stage in plan.stages
        },
        "total": {"seconds": plan.seconds, "cost": plan.cost, "disk_bytes": plan.disk_bytes},
        "training_memory": {**dataclasses.asdict(memory), "total": memory.total},
        "memory_limit_bytes": plan.memory_limit_bytes,
        "measurement": None if found is None else dataclasses.asdict(found),
        "assumptions": plan.assumptions,
        "warnings": plan.warnings,
        "not_yet": planned(job),
        "commands": commands(arguments, job),
    }


def _job_rows(job: Job) -> list[tuple[str, str]]:
    shape, ratio = job.shape, job.tokens_per_parameter
    preset = f"preset {shape.option}, " if shape.option else ""
    relation = ratio / OPTIMAL_TOKENS_PER_PARAMETER
    if relation > 2:
        words = f"{relation:,.2g} times over-trained: a better model of this size, cheap to serve"
    elif relation < 0.5:
        words = (
            f"under-trained: a smaller model would learn more from them ({relation:.2g} of that)"
        )
    else:
        words = "near it"
    epochs = (
        f", {job.max_epochs} passes over {count(job.corpus_tokens)}" if job.max_epochs > 1 else ""
    )
    tokens = job.batch_size * job.accumulate_grad_batches * job.machines.num_devices
    tokens *= job.max_sample_length
    num_devices = job.machines.num_devices
    devices = f"{num_devices:,} devices ({job.strategy})" if num_devices > 1 else "one device"
    return [
        ("model", f"{preset}{shape.words}, vocabulary {shape.vocab_size:,}"),
        ("tokens", f"{count(job.num_tokens)}{epochs}"),
        (
            "a parameter",
            f"{ratio:,.3g} tokens; the least loss for the arithmetic is at "
            f"{OPTIMAL_TOKENS_PER_PARAMETER:.0f} (Hoffmann et al. 2022): {words}",
        ),
        (
            "arithmetic",
            f"{job.flops:.2g} FLOPs: {shape.flops_per_token(job.max_sample_length):.2g} a token (6 N + "
            "attention, Chowdhery et al. 2022)",
        ),
        (
            "a step",
            f"up to {tokens:,} tokens: batches of {job.batch_size} x {job.max_sample_length:,}, "
            f"accumulated {job.accumulate_grad_batches}, on {devices}"
            + (", activations recomputed" if job.activation_checkpointing else ""),
        ),
    ]


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    found = plan.measurement
    memory = memory_of(plan.job, bfloat16=found is None or found.bfloat16)
    parts = dataclasses.asdict(memory)
    rows = [(name, size(value)) for name, value in parts.items()]
    limit = plan.memory_limit_bytes
    rows.append(
        ("by formula", size(memory.total) + ("" if limit is None else f" of {size(limit)}"))
    )
    if found is not None and found.is_same_shape and found.device == "cpu":
        rows.append(("measured", size(found.peak_bytes)))
    return rows


def _table(plan: Plan) -> Iterator[str]:
    total = Stage(name="in all", seconds=plan.seconds, cost=plan.cost, disk_bytes=plan.disk_bytes)
    rows = [("stage", "time", "cost", "memory", "disk", "")]
    for stage in (*plan.stages, total):
        rows.append(
            (
                stage.name,
                "" if stage.seconds is None else duration(stage.seconds),
                ""
                if stage.cost is None
                else f"{stage.cost:,.2f}"
                if stage.cost < 100
                else f"{stage.cost:,.0f}",
                "" if stage.memory_bytes is None else size(stage.memory_bytes),
                "" if stage.disk_bytes is None else size(stage.disk_bytes),
                stage.remark,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:5], widths[1:], strict=True)]
        yield f"  {'   '.join((*cells, row[5]))}".rstrip()


def _rows(rows: list[tuple[str, str]]) -> Iterator[str]:
    yield from (f"  {name:<13}{value}" for name, value in rows)
