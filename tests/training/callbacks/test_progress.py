"""The progress line is calm, fits its terminal, and counts this run alone."""

import io
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.training.callbacks.meter import Meter, Reading
from full_stack_transformer.training.callbacks.progress import Progress, duration, summarize
from full_stack_transformer.training.module import ValidationMetrics
from tests.training.small_training import SmallTraining

_LINE = re.compile(
    r"step (?P<step>[\d,]+)(?: of (?P<total>[\d,]+))? +(?P<percent>\d+)%  loss (?P<loss>[\d.]+)  "
    r"(?P<rate>[\d,]+) tokens/s  MFU \d+%  (?P<left>.*) left"
)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _fit(training: SmallTraining, *, interval: float, terminal: _Terminal | None) -> Meter:
    """Train with a progress line every `interval` seconds."""
    meter = Meter(num_context_tokens=40)
    names = ("_SECONDS_BETWEEN_LINES", "_SECONDS_BETWEEN_REFRESHES")
    module = "full_stack_transformer.training.callbacks.progress"
    with (
        mock.patch.object(sys, "stderr", terminal or sys.stderr),
        mock.patch(f"{module}.{names[0]}", interval),
        mock.patch(f"{module}.{names[1]}", interval),
    ):
        training.fit(meter, Progress(meter, show=True))
    return meter


def test_a_terminal_shows_one_line_that_is_rewritten(
    dataset: DatasetDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    terminal = _Terminal()
    _fit(
        SmallTraining(dataset, tmp_path, max_steps=6, val_check_interval=4),
        interval=0.0,
        terminal=terminal,
    )
    shown = terminal.getvalue()
    before, after, rest = shown.split("\n")
    assert rest == ""
    found = [_LINE.fullmatch(line.strip()) for line in before.split("\r")[1:]]
    # Not the first step, which says nothing of the rate; the last once more, before the validation.
    assert [match["step"] for match in found if match] == ["2", "3", "4", "4"]
    assert {match["total"] for match in found if match} == {"6"}
    assert [match["percent"] for match in found if match] == ["33", "50", "67", "67"]
    last = _LINE.fullmatch(after.split("\r")[-1].strip())
    assert last is not None
    assert (last["step"], last["left"]) == ("6", "0 s")


def test_a_narrow_terminal_gets_a_line_that_fits(
    dataset: DatasetDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal = _Terminal()
    _fit(SmallTraining(dataset, tmp_path, max_steps=4), interval=0.0, terminal=terminal)
    assert all(len(line) < 40 for line in re.split(r"[\r\n]", terminal.getvalue()))


def test_a_log_gets_a_line_now_and_then(
    dataset: DatasetDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        _fit(SmallTraining(dataset, tmp_path, max_steps=4), interval=0.0, terminal=None)
        lines = [message for message in caplog.messages if _LINE.fullmatch(message)]
        assert len(lines) == 3
        caplog.clear()
        _fit(SmallTraining(dataset, tmp_path, max_steps=4), interval=60.0, terminal=None)
        assert not [message for message in caplog.messages if _LINE.fullmatch(message)]


def test_minutes_have_no_number_of_steps(
    dataset: DatasetDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        training = SmallTraining(dataset, tmp_path, max_minutes=0.015, val_check_interval=10_000)
        _fit(training, interval=0.0, terminal=None)
    found = [match for message in caplog.messages if (match := _LINE.fullmatch(message))]
    assert found
    assert all(match["total"] is None for match in found)
    assert [int(match["percent"]) for match in found] == sorted(
        int(match["percent"]) for match in found
    )


@pytest.mark.parametrize("batching", ["length", "packed"])
def test_an_epoch_has_every_token_once(
    batching: str, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    """Whatever the batches are made of: padding never counts, and first tokens do."""
    meter = Meter(num_context_tokens=40)
    training = SmallTraining(
        dataset,
        tmp_path,
        batching=batching,
        max_epochs=1,
        batch_size=16,
        accumulate_grad_batches=3,
    )
    training.fit(meter)
    assert meter.read().num_tokens == dataset.train.num_tokens


def test_validations_are_no_time_of_training(dataset: DatasetDirectory, tmp_path: Path) -> None:
    class Slow(pl.Callback):
        def on_validation_end(self, *_: Any) -> None:
            time.sleep(0.2)

    meter = Meter(num_context_tokens=40)
    started = time.monotonic()
    SmallTraining(dataset, tmp_path, max_steps=6, val_check_interval=2).fit(meter, Slow())
    assert meter.read().seconds < time.monotonic() - started - 0.6
    stopped = meter.read()
    time.sleep(0.01)
    assert meter.read() == stopped


def test_a_resumed_training_adds_to_the_totals_and_not_to_the_rate(
    dataset: DatasetDirectory, tmp_path: Path
) -> None:
    meter = Meter(num_context_tokens=40)
    SmallTraining(dataset, tmp_path, max_steps=3).fit(meter)
    torch.save(meter.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    state["seconds"] += 1000.0
    again = Meter(num_context_tokens=40)
    again.load_state_dict(state)
    SmallTraining(dataset, tmp_path, max_steps=3).fit(again)
    reading = again.read()
    assert reading.num_tokens == 2 * meter.read().num_tokens
    assert reading.seconds > 1000
    assert reading.tokens_per_second_since(again.first) > 100


def test_the_smoothed_loss_is_a_mean_that_forgets(
    dataset: DatasetDirectory, tmp_path: Path
) -> None:
    meter = Meter(num_context_tokens=40)
    losses: list[float] = []

    class Note(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            losses.append(float(meter.loss))
            # Of so few steps it is the plain mean.
            assert float(meter.smoothed_loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    SmallTraining(dataset, tmp_path, max_steps=5).fit(meter, Note())
    assert len(set(losses)) == 5


def test_the_summary_says_how_to_serve(tmp_path: Path) -> None:
    meter = mock.Mock(spec=Meter)
    meter.first = Reading(100, 2.0)
    meter.read.return_value = Reading(1_000_100, 102.0)
    meter.utilization.return_value = 0.615
    best = ValidationMetrics(step=90, loss=2.5, metrics={"perplexity": 12.18, "bits_per_byte": 1.5})
    summary = summarize(meter, best, num_steps=100, seconds_taken=130.2)
    assert summary.lines(tmp_path / "my books" / "0") == [
        "trained 100 steps on 1,000,100 tokens in 2 min 10 s, 10,000 tokens/s, MFU 62%",
        "best validation loss 2.5000 at step 90: perplexity 12.18, 1.500 bits per byte",
        f"serve it: fst serve '{tmp_path}/my books/0'",
    ]
    assert json.loads(json.dumps(summary.as_json()))["best_step"] == 90
    nothing = summarize(meter, None, num_steps=0, seconds_taken=1.0)
    assert len(nothing.lines(tmp_path)) == 1
    assert nothing.best_validation_loss is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.6, "1 min 00 s"),
        (250.0, "4 min 10 s"),
        (3599.7, "1 h 00 min"),
        (7500.0, "2 h 05 min"),
        (200_000.0, "2 d 07 h"),
    ],
)
def test_a_duration_is_said_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words
