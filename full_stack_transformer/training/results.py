"""What a trained model predicts for a split, in the files of an experiment.

eval_results.json                            the figures of the validation rows
test_predictions.jsonl  test_results.json    a prediction a row, and figures where rows have labels
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from full_stack_transformer.errors import RowError
from full_stack_transformer.rows.files import PLACE
from full_stack_transformer.rows.splits import Split
from full_stack_transformer.storage import write_json, write_text
from full_stack_transformer.tasks.task import Prediction, Row, Task

logger = logging.getLogger(__name__)

_NAMES: Mapping[Split, str] = {"train": "train", "valid": "eval", "test": "test"}


def write_results(
    directory: Path,
    task: Task,
    split: Split,
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
) -> dict[str, float]:
    """Write the files, and return the figures; none for rows without labels.

    Args:
        directory: of the experiment.
        task: measures.
        split: names the files.
        rows: of the split.
        predictions: one for each.
    """
    name = _NAMES[split]
    if split == "test":
        lines = [
            {**{key: value for key, value in row.items() if key != PLACE}, "prediction": prediction}
            for row, prediction in zip(rows, predictions, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        write_text(directory / f"{name}_predictions.jsonl", text)
    try:
        figures = task.figures(rows, predictions).scalars
    except (KeyError, RowError):  # a test set that keeps its labels to itself
        figures = {}
    write_json(directory / f"{name}_results.json", figures)
    logger.info(
        "%s: %s rows%s",
        name,
        f"{len(rows):,}",
        "".join(f", {key} {value:.4f}" for key, value in figures.items()),
    )
    return figures
