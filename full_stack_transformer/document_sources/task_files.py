"""`fst collect_documents python_docs --task TASK`: a small labelled data set as train, valid and test rows.

    task_rows ──> DOCUMENTS_ROOT/python_docs_TASK/{train,valid,test}.jsonl, description.json

All files or none; the same interpreter gives the same bytes. Knows nothing of where the rows come from.
"""

import json
import logging
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.data import CollectDocumentsArguments
from full_stack_transformer.document_sources.task_rows import Side, TaskRow, task_rows
from full_stack_transformer.errors import MachineError
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    file_facts,
    sync_directory,
    write_json,
    write_text,
)

logger = logging.getLogger(__name__)

_SIDES: tuple[Side, ...] = ("train", "valid", "test")


def collect_task_rows(arguments: CollectDocumentsArguments, task: str) -> Path:
    """Write the rows of a task and return the directory that holds them.

    Raises:
        MachineError: this interpreter has no sources, or the files cannot be written.
    """
    started = time.perf_counter()
    rows = task_rows(task)
    directory = arguments.documents_root / f"{arguments.source}_{task}"
    try:
        _write(directory, task, rows)
    except OSError as error:
        raise MachineError(
            f"writing to {directory} failed: {error.strerror or error}; free space or fix the "
            "rights, or name another --documents_root"
        ) from error
    counts = Counter(row.side for row in rows)
    logger.info(
        "collected %s rows to train, %s to validate and %s to test in %.1f s: %s",
        *(f"{counts[side]:,}" for side in _SIDES),
        time.perf_counter() - started,
        directory,
    )
    return directory


def _write(directory: Path, task: str, rows: Sequence[TaskRow]) -> None:
    """Replace the files once all of them are on the disk."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as name:
        partial = Path(name)
        for side in _SIDES:
            lines = [
                json.dumps(row.fields, ensure_ascii=False) + "\n"
                for row in rows
                if row.side == side
            ]
            write_text(partial / f"{side}.jsonl", "".join(lines))
        write_json(partial / DESCRIPTION_FILE_NAME, _description(partial, task, rows))
        for file in sorted(partial.iterdir()):
            file.replace(directory / file.name)
    sync_directory(directory)


def _description(partial: Path, task: str, rows: Sequence[TaskRow]) -> dict[str, Any]:
    counts = Counter(row.side for row in rows)
    description: dict[str, Any] = {
        "task": task,
        "source": f"docstrings and help topics of Python {platform.python_version()}",
        "fields": list(rows[0].fields),
        "number_of_rows": {side: counts[side] for side in _SIDES},
        "files": {f"{side}.jsonl": file_facts(partial / f"{side}.jsonl") for side in _SIDES},
    }
    if isinstance(rows[0].fields.get("label"), str):
        labels = Counter(str(row.fields["label"]) for row in rows)
        description["number_of_rows_by_label"] = dict(sorted(labels.items()))
    return description
