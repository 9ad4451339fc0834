"""`--profile`: how long each phase of a step takes.

Lightning tells a profiler when each of its actions starts and ends. Here each action belongs to a phase, and
time counts for the innermost action that has one. The clock is read twice per action, which is microseconds
a step. A GPU keeps computing after an action has ended: there one step in ten is measured with a wait at each
action, the others run as usual.

Lightning's `SimpleProfiler` sums overlapping actions without wait, so that on a GPU the time of a forward
pass shows up wherever the program waits next; `PyTorchProfiler` records operators, which are listed here too,
but no share of a step for loading, validation or checkpoints.
"""

import contextlib
import logging
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.profilers import Profiler
from torch.autograd.profiler import profile

from full_stack_transformer.storage import write_json

logger = logging.getLogger(__name__)

PROFILE_FILE_NAME = "profile.json"
# Names that mark parts of an action: `with trainer.profiler.profile(LOSS):`.
FORWARD, LOSS, HISTOGRAMS = "forward", "loss", "histograms"

_STEP_PHASES = ("loading", FORWARD, LOSS, "backward", "optimizer", "logging", "other")
_PHASES_BESIDE = ("validation", "text samples", "model directory", "checkpoints", HISTOGRAMS)
# Last part of an action's name -> phase. Other actions count for the action around them.
_PHASE_OF_ACTION = {
    "train_dataloader_next": "loading",
    "on_before_batch_transfer": "loading",
    "batch_to_device": "loading",
    "training_step": FORWARD,
    FORWARD: FORWARD,
    LOSS: LOSS,
    HISTOGRAMS: HISTOGRAMS,
    "backward": "backward",
    "optimizer_step": "optimizer",
    "optimizer_zero_grad": "optimizer",
    "configure_gradient_clipping": "optimizer",
    "lr_scheduler_step": "optimizer",
    "validation_step": "validation",
    "val_next": "validation",
    "save_checkpoint": "checkpoints",
}
_PHASE_OF_CALLBACK_AT_VALIDATION = {
    "SampleTexts": "text samples",
    "ExportModel": "model directory",
}
# Steps for compilation and allocation; watched by the profiler of operators; to recover from it.
_NUM_WARMUP_STEPS, _NUM_OPERATOR_STEPS, _NUM_SETTLING_STEPS = 3, 3, 1
_FIRST_MEASURED_STEP = _NUM_WARMUP_STEPS + _NUM_OPERATOR_STEPS + _NUM_SETTLING_STEPS
_STEPS_PER_WAIT_ON_CUDA = 10
_NUM_OPERATORS = 15


class StepProfiler(Profiler):
    """Adds up the time of each phase; at the end logs a table and writes profile.json.

    Args:
        directory: the experiment directory.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._phases: dict[str, str | None] = {}
        self._stack: list[str | None] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._base = "other"
        self._marked = self._began = self._wall_seconds = 0.0
        self._num_steps = self._num_measured = 0
        self._ended_step = False
        self._is_measuring = self._waits = False
        self._operator_profiler: profile | None = None
        self._operators: list[dict[str, Any]] = []

    def start(self, action_name: str) -> None:
        """An action begins inside the one that is open."""
        self._mark()
        if action_name not in self._phases:
            self._phases[action_name] = _phase_of(action_name)
        phase = self._phases[action_name]
        if not self._stack:
            self._began = self._marked
        elif action_name.endswith("train_dataloader_next"):
            self._begin_batch()
        elif phase == "validation":
            self._base = "validation"
        elif self._base == "validation" and phase in _STEP_PHASES:
            phase = None  # a forward pass of the validation is no part of a step
        self._stack.append(phase or (self._stack[-1] if self._stack else None))

    def stop(self, action_name: str) -> None:
        """The innermost action ends."""
        self._mark()
        if self._stack:
            self._stack.pop()
        if action_name.endswith(".optimizer_step"):
            self._ended_step = True
        elif action_name == "run_training_epoch":
            self._end_step()
            self._stop_operators()
            self._wall_seconds += self._marked - self._began

    @rank_zero_only
    def describe(self) -> None:
        """Log and write the result; Lightning calls this at the end."""
        if not self._num_measured:
            logger.info(
                "the training was too short to profile: %d steps, of which the first %d are not counted",
                self._num_steps,
                _FIRST_MEASURED_STEP,
            )
            return
        content = self.content()
        write_json(self._directory / PROFILE_FILE_NAME, content)
        logger.info("%s", as_table(content))

    def content(self) -> dict[str, Any]:
        """The content of profile.json."""
        per_step = {
            phase: 1e3 * self._seconds[phase] / self._num_measured for phase in _STEP_PHASES
        }
        return {
            "num_steps": self._num_steps,
            "num_measured_steps": self._num_measured,
            "milliseconds_per_step": per_step,
            "seconds_beside_steps": {phase: self._seconds[phase] for phase in _PHASES_BESIDE},
            "seconds_taken": self._wall_seconds,
            "operators": self._operators,
        }

    def _mark(self) -> None:
        """Count the time since the last mark for the innermost open action."""
        if self._waits:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            phase = self._stack[-1] or self._base
            if self._is_measuring or phase in _PHASES_BESIDE:
                self._seconds[phase] += now - self._marked
        self._marked = now

    def _begin_batch(self) -> None:
        self._base = "other"
        if not self._ended_step and self._num_steps:
            return  # in the middle of an accumulation window
        self._end_step()
        self._is_measuring = self._waits = False
        if self._num_steps == _NUM_WARMUP_STEPS:
            self._start_operators()
        elif self._num_steps == _NUM_WARMUP_STEPS + _NUM_OPERATOR_STEPS:
            self._stop_operators()
        elif self._num_steps >= _FIRST_MEASURED_STEP:
            is_cuda = _is_on_cuda()
            self._is_measuring = not is_cuda or self._num_steps % _STEPS_PER_WAIT_ON_CUDA == 0
            self._waits = is_cuda and self._is_measuring
        self._mark()

    def _end_step(self) -> None:
        self._num_steps += self._ended_step
        self._num_measured += self._ended_step and self._is_measuring
        self._ended_step = False

    def _start_operators(self) -> None:
        self._operator_profiler = profile(
            use_kineto=True, use_device="cuda" if _is_on_cuda() else None
        )
        with _silent_standard_error():
            self._operator_profiler.__enter__()  # type: ignore[no-untyped-call]

    def _stop_operators(self) -> None:
        if self._operator_profiler is None:
            return
        with _silent_standard_error():
            self._operator_profiler.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._operators = _heaviest_operators(self._operator_profiler)
        self._operator_profiler = None


@contextlib.contextmanager
def _silent_standard_error() -> Iterator[None]:
    """Torch's profiler prints lines that only KINETO_LOG_LEVEL=6, set before torch, would prevent."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _is_on_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _phase_of(action: str) -> str | None:
    """The phase of an action such as `[Strategy]DDPStrategy.backward`; None for that of the outer action."""
    owner, _, name = action.rpartition(".")
    if name.startswith("on_validation"):
        for callback, phase in _PHASE_OF_CALLBACK_AT_VALIDATION.items():
            if owner.startswith(f"[Callback]{callback}"):
                return phase
        return "validation"
    if owner.startswith("[Callback]") and not name.endswith("_checkpoint"):
        return "logging"
    return _PHASE_OF_ACTION.get(name)


def _heaviest_operators(profiler: profile) -> list[dict[str, Any]]:
    """The operators with the most own time, in milliseconds a step."""
    totals: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():  # type: ignore[no-untyped-call]
        own_microseconds = max(event.self_cpu_time_total, event.self_device_time_total)
        totals[event.key] += own_microseconds
        calls[event.key] += event.count
    return [
        {
            "name": name,
            "milliseconds_per_step": microseconds / 1e3 / _NUM_OPERATOR_STEPS,
            "calls_per_step": calls[name] / _NUM_OPERATOR_STEPS,
        }
        for name, microseconds in totals.most_common(_NUM_OPERATORS)
    ]


def as_table(content: dict[str, Any]) -> str:
    """The content of profile.json as a table."""
    per_step: dict[str, float] = content["milliseconds_per_step"]
    step = max(sum(per_step.values()), 1e-9)
    wall = max(content["seconds_taken"], 1e-9)
    lines = [f"time of a step, mean of {content['num_measured_steps']:,} steps"]
    for phase, milliseconds in [*per_step.items(), ("a step", step)]:
        lines.append(f"  {phase:<16}{milliseconds:>10.2f} ms{milliseconds / step:>8.1%}")
    lines.append(f"outside the steps, of {wall:,.1f} s")
    for phase, seconds in content["seconds_beside_steps"].items():
        lines.append(f"  {phase:<16}{seconds:>10.2f} s {seconds / wall:>8.1%}")
    lines.append("slowest operators, own time, while profiled")
    for operator in content["operators"]:
        lines.append(
            f"  {operator['milliseconds_per_step']:>10.2f} ms a step"
            f"{operator['calls_per_step']:>7,.0f} calls  {operator['name']}"
        )
    return "\n".join(lines)
