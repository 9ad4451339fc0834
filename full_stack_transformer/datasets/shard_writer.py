"""Writes a corpus in shards of bounded size; `shards` says what they are.

    train/shards.jsonl   samples and tokens of each finished shard, until the description lists them

A shard is finished when the next sample does not fit. So the shards depend on the samples alone, and not on
how many were appended at a time, on an interruption, or on what was cut off again.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.corpus import (
    CORPUS_FILE_NAME,
    LEARNED_DTYPE,
    LEARNED_FILE_NAME,
    POSITION_DTYPE,
    POSITIONS_FILE_NAME,
    CorpusWriter,
    token_dtype,
)
from full_stack_transformer.datasets.shards import ShardCounts, shard_file_name
from full_stack_transformer.storage import write_text

SHARDS_FILE_NAME = "shards.jsonl"
# Of the header of a file.
_HEADER_BYTES = 128


class ShardedCorpusWriter:
    """Appends samples to the shards of a corpus; complete after the `with`. See `CorpusWriter`.

    Args:
        directory: of the split.
        vocab_size: decides the type of the ids.
        max_bytes: of the files of a shard together; a sample that is larger is a shard of its own.
        num_tokens: that are there already.
        num_samples: that are there already.
        has_answers: whether it is said of each token if it is learned.
        samples_together: so many consecutive samples are in one shard: 2 for pairs.
    """

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        *,
        max_bytes: int,
        num_tokens: int = 0,
        num_samples: int = 0,
        has_answers: bool = False,
        samples_together: int = 1,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._vocab_size, self._has_answers = directory, vocab_size, has_answers
        self._token_bytes = token_dtype(vocab_size).itemsize + has_answers * LEARNED_DTYPE.itemsize
        self._room = max_bytes - (2 + has_answers) * _HEADER_BYTES
        self._together = samples_together
        self._finished = read_shards(directory)
        self._writer: CorpusWriter | None = None
        self.cut(num_tokens=num_tokens, num_samples=num_samples)

    @property
    def num_samples(self) -> int:
        """Samples so far."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_finished(self) -> int:
        """Shards to which nothing is added, unless it is cut off again."""
        return len(self._finished)

    @property
    def shards(self) -> list[ShardCounts]:
        """The finished ones, and the open one if it holds anything."""
        writer = self._writer
        if writer is None or not writer.num_samples:
            return self._finished
        return [*self._finished, ShardCounts(writer.num_samples, writer.num_tokens)]

    def append(
        self,
        token_ids: NDArray[np.generic],
        lengths: NDArray[np.int64],
        learned: NDArray[np.generic] | None = None,
    ) -> None:
        """Append samples, as `CorpusWriter` does."""
        token_ends = np.cumsum(lengths)
        ends = np.cumsum(lengths * self._token_bytes + POSITION_DTYPE.itemsize)
        first = 0
        while first < len(lengths):
            writer = self._open()
            used = (
                writer.num_tokens * self._token_bytes + writer.num_samples * POSITION_DTYPE.itemsize
            )
            before = int(ends[first - 1]) if first else 0
            fitting = int(np.searchsorted(ends, before + self._room - used, side="right")) - first
            fitting -= (writer.num_samples + fitting) % self._together
            if fitting <= 0 and writer.num_samples:
                self._finish()
                continue
            end = min(len(lengths), first + max(fitting, self._together))
            tokens = slice(int(token_ends[first - 1]) if first else 0, int(token_ends[end - 1]))
            marks = None if learned is None else learned[tokens]
            writer.append(token_ids[tokens], lengths[first:end], marks)
            first = end

    def cut(self, *, num_tokens: int, num_samples: int) -> None:
        """Remove everything after the first samples; a shard that is reached is open again."""
        finished = list(self._finished)
        while finished and sum(shard.num_samples for shard in finished) >= num_samples:
            finished.pop()
        rest = {
            "num_tokens": num_tokens - sum(shard.num_tokens for shard in finished),
            "num_samples": num_samples - sum(shard.num_samples for shard in finished),
        }
        if len(finished) == len(self._finished) and self._writer is not None:
            self._writer.cut(**rest)
            return
        self._abandon()
        self._finished = finished
        self._write_shards()
        self._remove_from(len(finished) + 1)
        self._writer = self._new_writer(**rest)

    def flush(self) -> None:
        """Make what was appended durable."""
        self._open().flush()

    def _open(self) -> CorpusWriter:
        if self._writer is None:
            self._writer = self._new_writer()
        return self._writer

    def _new_writer(self, *, num_tokens: int = 0, num_samples: int = 0) -> CorpusWriter:
        return CorpusWriter(
            self._directory,
            self._vocab_size,
            num_tokens=num_tokens,
            num_samples=num_samples,
            has_answers=self._has_answers,
            shard=len(self._finished),
        )

    def _finish(self) -> None:
        self._finished = self.shards
        assert self._writer is not None, "only an open shard is finished"
        self._writer.close()
        self._writer = None
        with (self._directory / SHARDS_FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(self._finished[-1])) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def _write_shards(self) -> None:
        lines = (json.dumps(dataclasses.asdict(shard)) + "\n" for shard in self._finished)
        write_text(self._directory / SHARDS_FILE_NAME, "".join(lines))

    def _remove_from(self, index: int) -> None:
        while _remove_shard(self._directory, index):
            index += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exception_type is not None:
            self._abandon()
        elif self._writer is not None and self._writer.num_samples:
            self._finish()
        elif self._writer is not None:
            self._abandon()
            _remove_shard(self._directory, len(self._finished))


def read_shards(directory: Path) -> list[ShardCounts]:
    """The finished shards of a split that is being written."""
    path = directory / SHARDS_FILE_NAME
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = content[: content.rfind("\n") + 1].splitlines()  # killed while writing the last line
    return [ShardCounts(**json.loads(line)) for line in lines]


def shard_file_names(index: int, *, has_answers: bool) -> Sequence[str]:
    """The files of a shard."""
    names = (CORPUS_FILE_NAME, POSITIONS_FILE_NAME, *([LEARNED_FILE_NAME] * has_answers))
    return [shard_file_name(name, index) for name in names]


def _remove_shard(directory: Path, index: int) -> bool:
    paths = [directory / name for name in shard_file_names(index, has_answers=True)]
    found = any(path.exists() for path in paths)
    for path in paths:
        path.unlink(missing_ok=True)
    return found


def corpus_writer(
    directory: Path, vocab_size: int, *, max_shard_bytes: int | None, **options: Any
) -> CorpusWriter | ShardedCorpusWriter:
    """Writes one file of each kind, or shards of so many bytes; the options of both."""
    if max_shard_bytes is None:
        options.pop("samples_together", None)
        return CorpusWriter(directory, vocab_size, **options)
    return ShardedCorpusWriter(directory, vocab_size, max_bytes=max_shard_bytes, **options)
