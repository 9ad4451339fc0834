"""`fst evaluate` on labelled rows: figures with intervals, baselines, predictions and the worst errors."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.errors import RowError
from full_stack_transformer.evaluation.baselines import baseline_predictions
from full_stack_transformer.evaluation.bootstrap import bootstrap_intervals
from full_stack_transformer.evaluation.pictures import confusion_picture
from full_stack_transformer.modelling.backbones import backbone_of_config
from full_stack_transformer.modelling.model_directory import find_model_directory
from full_stack_transformer.rows.fields import named_rows
from full_stack_transformer.rows.files import PLACE, read_rows
from full_stack_transformer.rows.splits import find_splits
from full_stack_transformer.storage import make_directories, write_json, write_text
from full_stack_transformer.tasks.catalogue import (
    CAUSAL_LM,
    SENTENCE_EMBEDDING,
    OpenedTask,
    open_task,
    task_name_of,
)
from full_stack_transformer.tasks.multiple_choice import MultipleChoice
from full_stack_transformer.tasks.task import Figures, Prediction, Row, Task

logger = logging.getLogger(__name__)

_NUM_WORST = 50
_RIGHT = 0.5


def evaluate_rows(arguments: EvaluateArguments) -> dict[str, Any]:
    """The content that `fst evaluate` prints, of a model of a task with labelled rows.

    A causal language model chooses by likelihood, unless it is told otherwise.

    Raises:
        RowError: there are no rows, or they do not fit the task.
        ModelError: the model has no head for the task.
    """
    own = task_name_of(find_model_directory(arguments.model))
    name = arguments.task or (MultipleChoice.name if own == CAUSAL_LM else own)
    opened = open_task(arguments.model, name=name, device=arguments.device)
    task = opened.task
    path, train_path = _paths(arguments)
    rows = named_rows(read_rows(path), task.name)
    if not rows:
        raise RowError(f"{path} has no rows")
    features = task.labelled_features(rows)
    predictions = task.predict_features(
        rows, features, opened.backbone, batch_size=arguments.batch_size
    )
    figures = task.figures(rows, predictions)
    if not figures.scalars:
        wanted = "a pair of texts and a label" if task.name == SENTENCE_EMBEDDING else "any words"
        raise RowError(f"{path} has no row with {wanted}, to measure by")
    content: dict[str, Any] = {
        "task": opened.name,
        "rows": str(path),
        "number_of_rows": len(rows),
        "figures": figures.scalars,
        "intervals": _intervals(task, rows, predictions, arguments),
    }
    if train_path is not None and arguments.baselines:
        train_rows = named_rows(read_rows(train_path), task.name)
        if not train_rows:
            raise RowError(
                f"{train_path} has no rows for the baselines to learn from; pass --no-baselines"
            )
        found = baseline_predictions(task, train_rows, rows)
        found["untrained"] = task.predict_features(
            rows, features, _untrained(opened, arguments), batch_size=arguments.batch_size
        )
        content["baselines"] = {
            name: task.figures(rows, one).scalars for name, one in found.items()
        }
    if figures.per_class:
        content["classes"] = [asdict(row) for row in figures.per_class]
    if arguments.output_dir is not None:
        _write(arguments.output_dir, task, rows, predictions, figures, content)
    _log(content)
    return content


def _paths(arguments: EvaluateArguments) -> tuple[Path, Path | None]:
    """The rows to measure on, and those that the baselines learn from.

    A single file is what it is; of a directory the test rows are taken, without any the validation rows.
    """
    data = arguments.data
    is_splits = data.is_dir() and any(path.name.split(".")[0] == "train" for path in data.iterdir())
    if not is_splits:
        return data, arguments.train_file
    splits = find_splits(data)
    order = ("test", "valid") if arguments.split == "auto" else (arguments.split,)
    for name in order:
        if name in splits:
            return splits[name], arguments.train_file or splits["train"]
    raise RowError(f"{data} has no {' or '.join(order)} rows; found {', '.join(splits)}")


def _intervals(
    task: Task, rows: Sequence[Row], predictions: Sequence[Prediction], arguments: EvaluateArguments
) -> dict[str, list[float]]:
    if not arguments.num_resamples:
        return {}
    found = bootstrap_intervals(
        lambda places: (
            task.figures(
                [rows[place] for place in places], [predictions[place] for place in places]
            ).scalars
        ),
        len(rows),
        num_resamples=arguments.num_resamples,
    )
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _untrained(opened: OpenedTask, arguments: EvaluateArguments) -> Any:
    """The same shape with random weights, always the same ones."""
    directory = find_model_directory(arguments.model)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = backbone_of_config(config, opened.task.backbone_class(config), str(directory))
    return backbone.to(next(opened.backbone.parameters()).device).eval()


def _write(
    directory: Path,
    task: Task,
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
    figures: Figures,
    content: Mapping[str, Any],
) -> None:
    make_directories(directory)
    lines = [
        {**{key: value for key, value in row.items() if key != PLACE}, "prediction": prediction}
        for row, prediction in zip(rows, predictions, strict=True)
    ]
    write_text(directory / "predictions.jsonl", _as_lines(lines))
    rightness = [task.is_right(*pair) for pair in zip(rows, predictions, strict=True)]
    worst = sorted(
        (number for number in range(len(rows)) if rightness[number] < _RIGHT),
        key=lambda number: rightness[number],
    )[:_NUM_WORST]
    errors = [{"place": rows[n].get(PLACE), "rightness": rightness[n], **lines[n]} for n in worst]
    write_text(directory / "worst_errors.jsonl", _as_lines(errors))
    if figures.confusion:
        picture = confusion_picture(figures.labels, figures.confusion)
        write_text(directory / "confusion_matrix.svg", picture)
    write_json(directory / "results.json", content)
    logger.info("wrote predictions, the worst errors and figures into %s", directory)


def _as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _log(content: Mapping[str, Any]) -> None:
    lines = [f"{content['number_of_rows']:,} rows of {content['rows']}"]
    for name, value in content["figures"].items():
        low, high = content["intervals"].get(name, (value, value))
        beside = ", ".join(
            f"{kind} {figures[name]:.3f}"
            for kind, figures in content.get("baselines", {}).items()
            if name in figures
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
