"""What a preparation shows: its progress, description.json, and the results as log lines."""

import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import progress as rich_progress
from rich.console import Console

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import (
    FORMAT_VERSION,
    POSITIONS_FILE_NAME,
    SHARDED_FORMAT_VERSION,
    token_dtype,
)
from full_stack_transformer.datasets.shard_writer import read_shards
from full_stack_transformer.datasets.shards import ShardCounts, shard_file_name
from full_stack_transformer.preparation.journal import SplitState
from full_stack_transformer.preparation.places import (
    Sending,
    StoredVersion,
    Version,
    files_of_dataset,
)
from full_stack_transformer.storage import file_facts, readable
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, class_name
from full_stack_transformer.tokenization.encoders import BackendName

logger = logging.getLogger(__name__)

_NUM_BINS = 8
_BAR_CHARACTERS = 40
# Positions in these count decompressed bytes or rows, whose total is not known before the end.
_UNKNOWN_LENGTHS = (".gz", ".zst", ".parquet")
# Without a terminal: seconds from the start to the first log line, and between later ones.
_SECONDS_BETWEEN_LINES = (8.0, 15.0, 30.0, 60.0)


class ProgressDisplay:
    """Shows how far a preparation is: a bar on a terminal, elsewhere a log line now and then.

    The lines come from a thread, so that there are some whatever takes long.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._log, daemon=True)
        self._bar: rich_progress.Progress | None = None
        self._task = rich_progress.TaskID(0)
        self._name = "starting"
        self._num_files = self._files_begun = self._num_bytes = 0
        self._position = 0
        self._counts_rows = False

    @contextlib.contextmanager
    def phase(self, name: str, files: Sequence[Path] = ()) -> Iterator[None]:
        """Inside the `with` this is done, with these files one after the other."""
        self._name = name
        self._num_files, self._files_begun, self._num_bytes = len(files), 0, 0
        if not self._is_terminal:
            yield
            return
        is_known = files and not any(path.suffix.lower() in _UNKNOWN_LENGTHS for path in files)
        total = sum(path.stat().st_size for path in files) if is_known else None
        with rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as self._bar:
            self._task = self._bar.add_task(name, total=total)
            yield
        self._bar = None

    def begin_file(self, path: Path, position: int = 0) -> None:
        """The next positions are of this file; an earlier run read what is before `position`."""
        self._files_begun += 1
        self._position = 0
        self._counts_rows = path.suffix.lower() == ".parquet"
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._name}: {readable(path.name)}")
        self.advance_to(position)

    def advance_to(self, position: int) -> None:
        """The file has been read up to `position`."""
        advance, self._position = position - self._position, position
        if not self._counts_rows:
            self._num_bytes += advance
        if self._bar is not None:
            self._bar.advance(self._task, advance)

    def _log(self) -> None:
        for seconds in (*_SECONDS_BETWEEN_LINES, *(_SECONDS_BETWEEN_LINES[-1:] * (1 << 20))):
            if self._ended.wait(seconds):
                return
            done = ""
            if self._num_files:
                begun = min(self._files_begun, self._num_files)
                done = f": file {begun:,} of {self._num_files:,}"
                done += f", {self._num_bytes / 1e6:,.1f} MB" if self._num_bytes else ""
            logger.info("%s%s, after %.0f s", self._name, done, time.monotonic() - self._started)

    def __enter__(self) -> "ProgressDisplay":
        if not self._is_terminal:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()


def describe(
    arguments: PrepareDatasetArguments,
    tokenizer: DocumentTokenizer,
    backend: BackendName,
    states: dict[str, SplitState],
    input_files: Mapping[str, Sequence[Path]],
    directory: Path,
    started: float,
    display: ProgressDisplay,
    sending: Sending | None = None,
) -> dict[str, Any]:
    """The content of description.json, without paths of this machine."""
    shards = {split: read_shards(directory / split) or None for split in states}
    is_sharded = None not in shards.values()
    outputs = files_of_dataset(directory)
    hashed = [*(path for paths in input_files.values() for path in paths), *outputs]
    facts: dict[Path, dict[str, str | int]] = {}
    # Hashing releases the interpreter's lock.
    with display.phase("hashing files", hashed), ThreadPoolExecutor() as threads:
        for path, found in zip(hashed, threads.map(file_facts, hashed), strict=True):
            facts[path] = found
            display.begin_file(path)
    return {
        **_portable_options(arguments),
        **{
            f"number_of_{split}_{unit}": getattr(states[split].samples, f"num_{unit}")
            for split in ("train", "valid")
            for unit in ("samples", "tokens")
        },
        "format_version": SHARDED_FORMAT_VERSION if is_sharded else FORMAT_VERSION,
        "tokenizer_cls_name": class_name(type(tokenizer)),
        "tokenizer_backend": f"{backend} {version(backend)}",
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "special_token_ids": {
            "begin": tokenizer.begin_id,
            "end": tokenizer.end_id,
            "pad": tokenizer.pad_id,
        },
        "document_framing": {
            "begin": tokenizer.prefix,
            "text_before": tokenizer.text_before,
            "text_after": tokenizer.text_after,
            "end": tokenizer.end,
        },
        "counts": _counts(states),
        "sample_lengths": {
            split: _histogram(directory / split, states[split], arguments, shards[split], sending)
            for split in states
        },
        "input_files": {
            split: [{"name": readable(path.name), **facts[path]} for path in paths]
            for split, paths in input_files.items()
        },
        "output_files": dict(
            sorted(
                {
                    **(sending.facts if sending is not None else {}),
                    **{path.relative_to(directory).as_posix(): facts[path] for path in outputs},
                }.items()
            )
        ),
        "package_versions": {
            name: version(name) for name in ("full_stack_transformer", "numpy", "tokenizers")
        },
        "seconds_taken": round(time.perf_counter() - started, 3),
        **_described(shards),
    }


def _described(shards: Mapping[str, list[ShardCounts] | None]) -> dict[str, Any]:
    """What the description says of shards; nothing in the single form."""
    found = {
        split: list(map(dataclasses.asdict, counts)) for split, counts in shards.items() if counts
    }
    return {"shards": found} if found else {}


def _portable_options(arguments: PrepareDatasetArguments) -> dict[str, Any]:
    options = dataclasses.asdict(arguments)
    for option in ("documents_train_file", "documents_valid_file", "conversations", "preferences"):
        options[option] = [readable(path.name) for path in options[option]]
    if options["tokenizer_path"] is not None and Path(options["tokenizer_path"]).is_dir():
        options["tokenizer_path"] = Path(options["tokenizer_path"]).name
    for of_this_run in (
        *("datasets_root", "resume", "num_workers", "ray_address", "allow_code_from"),
    ):
        del options[of_this_run]
    if options["max_shard_bytes"] is None:
        del options["max_shard_bytes"]
    return options


def _counts(states: dict[str, SplitState]) -> dict[str, dict[str, int]]:
    """The counts of each split, for the description."""
    return {
        split: {**dataclasses.asdict(state.documents), **dataclasses.asdict(state.samples)}
        for split, state in states.items()
    }


def _histogram(
    directory: Path,
    state: SplitState,
    arguments: PrepareDatasetArguments,
    shards: list[ShardCounts] | None,
    sending: Sending | None,
) -> dict[str, list[int]]:
    """Histogram of sample lengths: `limits` (bins + 1,), the last included, and `counts` (bins,)."""
    limits = _limits(arguments)
    counts = np.zeros(len(limits) - 1, dtype=np.int64)
    num_sent = 0
    if sending is not None and directory.name in sending.lengths:
        counts += sending.lengths[directory.name]
        num_sent = sending.num_sent[directory.name]
    if shards is None:
        counts += _counted(directory / POSITIONS_FILE_NAME, state.samples.num_tokens, limits)
    for index, shard in list(enumerate(shards or ()))[num_sent:]:
        path = directory / shard_file_name(POSITIONS_FILE_NAME, index)
        counts += _counted(path, shard.num_tokens, limits)
    return {"limits": limits.tolist(), "counts": counts.tolist()}


def _limits(arguments: PrepareDatasetArguments) -> NDArray[np.int64]:
    """Of the bins of a histogram of lengths: (bins + 1,)."""
    limits = np.unique(
        np.linspace(arguments.min_sample_length, arguments.max_sample_length, _NUM_BINS + 1).astype(
            int
        )
    )
    return np.append(limits, limits[0] + 1) if len(limits) == 1 else limits


def sending_of(version: Version, arguments: PrepareDatasetArguments) -> Sending | None:
    """What sends the shards of a version in object storage while they are written; None on a disk."""
    if not isinstance(version, StoredVersion):
        return None
    limits = _limits(arguments)
    return Sending(
        version.directory,
        version.store,
        lambda path, num_tokens: _counted(path, num_tokens, limits),
    )


def _counted(path: Path, num_tokens: int, limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths of the samples of a file, whose last one ends after so many tokens, in each bin."""
    counts = np.zeros(len(limits) - 1, dtype=np.int64)
    starts = np.load(path, mmap_mode="r")
    at_once = 1 << 20
    for first in range(0, len(starts), at_once):
        part = starts[first : first + at_once + 1]
        is_end = first + at_once >= len(starts)
        lengths = np.diff(part, append=num_tokens) if is_end else np.diff(part)
        counts += np.histogram(lengths, limits)[0]
    return counts


def log_report(description: dict[str, Any], states: dict[str, SplitState], seconds: float) -> None:
    """Log the counts, the sample lengths and the speed."""
    for split, state in states.items():
        documents, samples = state.documents, state.samples
        notes = [
            f"{count:,} {what}"
            for count, what in (
                (documents.num_empty_documents, "empty documents"),
                (documents.num_unterminated_documents, "texts after the last delimiter dropped"),
                (documents.num_duplicate_documents, "duplicates dropped"),
                (documents.num_replaced_characters, "characters replaced"),
                (documents.num_forced_cuts, "words cut because they are longer than a block"),
            )
            if count
        ]
        logger.info(
            "%s: %s documents, %s samples, %s tokens; dropped %s samples (%s tokens) as too short%s",
            split,
            f"{documents.num_documents:,}",
            f"{samples.num_samples:,}",
            f"{samples.num_tokens:,}",
            f"{samples.num_dropped_samples:,}",
            f"{samples.num_dropped_tokens:,}",
            "".join(f", {note}" for note in notes),
        )
    log_lengths(description["sample_lengths"]["train"])
    num_tokens = sum(state.samples.num_tokens for state in states.values())
    num_bytes = sum(state.documents.num_bytes for state in states.values())
    logger.info(
        "prepared %s tokens in %.1f s, %s tokens/s, %.1f MB/s, %.2f bytes a token, with %s",
        f"{num_tokens:,}",
        seconds,
        f"{num_tokens / seconds:,.0f}",
        num_bytes / seconds / 1e6,
        _bytes_per_token(states),
        description["tokenizer_backend"],
    )


def _bytes_per_token(states: dict[str, SplitState]) -> float:
    """Bytes of the texts for each token that they became, without what formats put around them."""
    counts = [state.samples for state in states.values()]
    num_tokens = sum(split.num_tokens + split.num_dropped_tokens for split in counts)
    return sum(split.num_text_bytes for split in counts) / max(1, num_tokens)


def log_lengths(histogram: dict[str, list[int]]) -> None:
    """Log a histogram of sample lengths as bars."""
    limits, counts = histogram["limits"], histogram["counts"]
    longest = max([*counts, 1])
    width = len(f"{limits[-1]:,}")
    for low, high, count in zip(limits, limits[1:], counts, strict=False):
        bar = "█" * -(-count * _BAR_CHARACTERS // longest)
        logger.info(
            "  %*s–%-*s tokens %s %s", width, f"{low:,}", width, f"{high:,}", bar, f"{count:,}"
        )
