"""`fst evaluate` on labelled rows: metrics with intervals, baselines, predictions and the worst errors."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.errors import RowError
from full_stack_transformer.evaluation.bootstrap import bootstrap_intervals
from full_stack_transformer.modelling.backbones import backbone_of_config
from full_stack_transformer.modelling.places import find_model
from full_stack_transformer.modelling.pretrained import open_config
from full_stack_transformer.rows.fields import (
    PLACE,
    BadRows,
    Row,
    is_minus_one,
    labelled_rows,
    named_rows,
    without_place,
)
from full_stack_transformer.rows.files import read_rows
from full_stack_transformer.rows.splits import find_splits, has_training_rows
from full_stack_transformer.storage import make_directories, write_json, write_text
from full_stack_transformer.tasks.opening import OpenedTask, open_task
from full_stack_transformer.tasks.task import Metrics, Prediction, RowTask

logger = logging.getLogger(__name__)

_NUM_WORST = 50
_RIGHT = 0.5
# Of the picture, in pixels.
_CELL = 36
_CHARACTER = 7
_MAX_LABEL_CHARACTERS = 24


def evaluate_rows(arguments: EvaluateArguments, cls: type[RowTask]) -> dict[str, Any]:
    """What `fst evaluate` prints of a model on labelled rows.

    Args:
        arguments: the options.
        cls: what the model is to do with the rows.

    Raises:
        RowError: there are no rows, or they do not fit the task.
        ModelError: the model has no head for the task.
    """
    opened = open_task(arguments.model, base=arguments.base, cls=cls, device=arguments.device)
    task = opened.row_task
    path, train_path = _paths(arguments)
    rows = _rows(path, arguments, task)
    if not rows:
        raise RowError(f"{path} has no rows")
    features = task.labelled_features(rows)
    task.log_unknown_labels(rows, str(path))
    predictions = task.predict_features(
        rows, features, opened.backbone, batch_size=arguments.batch_size
    )
    metrics = task.metrics(rows, predictions)
    if not metrics.scalars:
        raise RowError(f"{path} has no row with {cls.measured_by}, to measure by")
    content: dict[str, Any] = {
        "task": opened.name,
        "rows": str(path),
        "number_of_rows": len(rows),
        "figures": metrics.scalars,
        "intervals": _intervals(task, rows, predictions, arguments),
    }
    if train_path is not None and arguments.baselines:
        found = _baselines(task, train_path, rows, arguments)
        found["untrained"] = task.predict_features(
            rows, features, _untrained(opened, arguments), batch_size=arguments.batch_size
        )
        content["baselines"] = {
            name: task.metrics(rows, one).scalars for name, one in found.items()
        }
    if metrics.per_class:
        content["classes"] = [asdict(row) for row in metrics.per_class]
    if arguments.output_dir is not None:
        _write(arguments.output_dir, task, rows, predictions, metrics, content)
    _log(content)
    return content


def holds_rows(path: Path) -> bool:
    """Whether it is a file, or a directory with training rows, and no dataset directory."""
    return path.is_file() or has_training_rows(path, as_file=True)


def _rows(path: Path, arguments: EvaluateArguments, task: RowTask) -> list[Row]:
    """The rows of a file under the names that the task reads."""
    bad = BadRows(str(path), arguments.on_bad_row)
    rows = read_rows(path, arguments, task.columns, has_words=task.reads_words)
    known = task.class_names
    is_label = any(map(is_minus_one, known)) if known else None
    found = named_rows(rows, task.named, bad=bad, minus_one_is_label=is_label)
    if bad.action == "skip":
        found = labelled_rows(found, task.has_label, bad)
    bad.log()
    return found


def _baselines(
    task: RowTask, train_path: Path, rows: Sequence[Row], arguments: EvaluateArguments
) -> dict[str, list[Prediction]]:
    """Predictions that need no model, by the name of the baseline."""
    train_rows = _rows(train_path, arguments, task)
    if not train_rows:
        raise RowError(
            f"{train_path} has no rows for the baselines to learn from; pass --no-baselines"
        )
    task.labelled_features(train_rows)
    task.log_unknown_labels(train_rows, str(train_path))
    known = [row for row in train_rows if not task.unknown_labels([row])]
    return task.baselines(known, rows)


def _paths(arguments: EvaluateArguments) -> tuple[Path, Path | None]:
    """The rows to measure on, and those that the baselines learn from.

    A single file is what it is; of a directory the test rows are taken, without any the validation rows.
    """
    data = arguments.data
    if not has_training_rows(data):
        return data, arguments.train_file
    splits = find_splits(data)
    order = ("test", "valid") if arguments.split == "auto" else (arguments.split,)
    for name in order:
        if name in splits:
            return splits[name], arguments.train_file or splits["train"]
    raise RowError(f"{data} has no {' or '.join(order)} rows; found {', '.join(splits)}")


def _intervals(
    task: RowTask,
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
    arguments: EvaluateArguments,
) -> dict[str, list[float]]:
    if not arguments.num_resamples:
        return {}
    found = bootstrap_intervals(
        lambda places: (
            task.metrics(
                [rows[place] for place in places], [predictions[place] for place in places]
            ).scalars
        ),
        len(rows),
        num_resamples=arguments.num_resamples,
    )
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _untrained(opened: OpenedTask, arguments: EvaluateArguments) -> Any:
    """The same shape with random weights, always the same ones."""
    directory = find_model(arguments.model, arguments.base).directory
    config = open_config(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = backbone_of_config(config, opened.task.backbone_class(config), str(directory))
    return backbone.to(next(opened.backbone.parameters()).device).eval()


def _write(
    directory: Path,
    task: RowTask,
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
    metrics: Metrics,
    content: Mapping[str, Any],
) -> None:
    make_directories(directory)
    lines = [
        {**without_place(row), "prediction": prediction}
        for row, prediction in zip(rows, predictions, strict=True)
    ]
    write_text(directory / "predictions.jsonl", _as_lines(lines))
    rightness = [task.is_right(*pair) for pair in zip(rows, predictions, strict=True)]
    worst = sorted(
        (index for index in range(len(rows)) if rightness[index] < _RIGHT),
        key=lambda index: rightness[index],
    )[:_NUM_WORST]
    errors = [{"place": rows[n].get(PLACE), "rightness": rightness[n], **lines[n]} for n in worst]
    write_text(directory / "worst_errors.jsonl", _as_lines(errors))
    if metrics.confusion:
        picture = confusion_picture(metrics.labels, metrics.confusion)
        write_text(directory / "confusion_matrix.svg", picture)
    write_json(directory / "results.json", content)
    logger.info("wrote predictions, the worst errors and metrics into %s", directory)


def _as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _log(content: Mapping[str, Any]) -> None:
    lines = [f"{content['number_of_rows']:,} rows of {content['rows']}"]
    for name, value in content["figures"].items():
        low, high = content["intervals"].get(name, (value, value))
        beside = ", ".join(
            f"{kind} {metrics[name]:.3f}"
            for kind, metrics in content.get("baselines", {}).items()
            if name in metrics
        )
        lines.append(
            f"{name:<20} {value:.4f}  ({low:.3f} to {high:.3f})" + (f"  {beside}" if beside else "")
        )
    classes = content.get("classes", [])
    if classes:
        width = max(5, *(len(one["label"]) for one in classes))
        lines.append(f"{'class':<{width}}  precision  recall     f1  support")
        lines += [
            f"{one['label']:<{width}}  {one['precision']:9.3f}  {one['recall']:6.3f}  {one['f1']:5.3f}  "
            f"{one['support']:7,}"
            for one in classes
        ]
    logger.info("%s", "\n".join(lines))


def confusion_picture(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """An SVG picture: a row for each expected class, a column for each predicted one.

    The darker a cell, the greater its part of the row.

    Args:
        labels: (classes,) their names.
        confusion: (classes, classes) counts.
    """
    names = [_shortened(label) for label in labels]
    margin = max(map(len, names)) * _CHARACTER + 30
    side = margin + len(names) * _CELL + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{side}" height="{side}" fill="white"/>',
        f'<text x="{margin}" y="14">predicted</text>',
        f'<text x="4" y="{margin - 8}">expected</text>',
    ]
    for index, name in enumerate(names):
        middle = margin + index * _CELL + _CELL / 2
        parts.append(f'<text x="{margin - 6}" y="{middle + 4}" text-anchor="end">{name}</text>')
        parts.append(
            f'<text transform="translate({middle + 4},{margin - 6}) rotate(-90)">{name}</text>'
        )
    for row, counts in enumerate(confusion):
        total = max(1, sum(counts))
        for column, count in enumerate(counts):
            parts += _cell(
                margin + column * _CELL, margin + row * _CELL, count, count / total, row == column
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, count: int, share: float, is_right: bool) -> list[str]:
    light = round(100 - 65 * share)
    hue = 145 if is_right else 15
    ink = "white" if share > 0.7 else "black"
    square = (
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" stroke="#ddd" '
        f'fill="hsl({hue},55%,{light}%)"/>'
    )
    if not count:
        return [square]
    middle = x + _CELL / 2
    return [
        square,
        f'<text x="{middle}" y="{y + _CELL / 2 + 4}" text-anchor="middle" fill="{ink}">{count}</text>',
    ]


def _shortened(label: str) -> str:
    if len(label) > _MAX_LABEL_CHARACTERS:
        label = f"{label[: _MAX_LABEL_CHARACTERS - 1]}…"
    return escape(label)
