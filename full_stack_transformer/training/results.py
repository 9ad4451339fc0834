"""--do_eval and --do_predict: what the best model predicts for a split, in the files of an experiment.

eval_results.json                            the metrics of the validation rows
test_predictions.jsonl  test_results.json    a prediction per row, and metrics where rows have labels
"""

import json
import logging
from pathlib import Path

from full_stack_transformer.errors import RowError, UsageError
from full_stack_transformer.modelling.other_files import MODEL_DIRECTORY_NAME
from full_stack_transformer.rows.fields import without_place
from full_stack_transformer.rows.splits import Split
from full_stack_transformer.storage import write_json, write_text
from full_stack_transformer.tasks.opening import open_task
from full_stack_transformer.training.data.rows import BaseDataModule

logger = logging.getLogger(__name__)

_NAMES: dict[Split, str] = {"train": "train", "valid": "eval", "test": "test"}


def write_results(experiment_directory: Path, data: BaseDataModule, split: Split) -> None:
    """Predict and measure the rows of a split, and write the files.

    Args:
        experiment_directory: where the model is, and the files go; without a model that of --model_path.
        data: the rows, and the options.
        split: which rows.

    Raises:
        RowError: there are none.
        UsageError: there is no model.
    """
    rows = data.named_rows(split)
    if not rows:
        raise RowError(f"{data.data_name} has no {split} rows; pass --test_file")
    opened = open_task(_model_to_apply(experiment_directory, data.arguments.model_path))
    task = opened.row_task
    predictions = task.predict(rows, opened.backbone, batch_size=data.arguments.batch_size)
    name = _NAMES[split]
    if split == "test":
        lines = [
            {**without_place(row), "prediction": prediction}
            for row, prediction in zip(rows, predictions, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        write_text(experiment_directory / f"{name}_predictions.jsonl", text)
    try:
        metrics = task.metrics(rows, predictions).scalars
    except (KeyError, RowError):  # a test set whose labels are not published
        metrics = {}
    write_json(experiment_directory / f"{name}_results.json", metrics)
    logger.info(
        "%s: %s rows%s",
        name,
        f"{len(rows):,}",
        "".join(f", {key} {value:.4f}" for key, value in metrics.items()),
    )


def _model_to_apply(experiment_directory: Path, model_path: str | None) -> Path:
    if (experiment_directory / MODEL_DIRECTORY_NAME).is_dir():
        return experiment_directory
    if model_path is None:
        raise UsageError(
            "--do_eval and --do_predict without --do_train need a trained model: pass --model_path, or "
            "--resume last"
        )
    return Path(model_path)
