"""One pass over input files: their documents go to the corpora of one or both splits.

    files -> parts --workers--> encoded blocks -> duplicates out -> train or valid -> samples -> corpus

Everything that depends on the order of the documents happens here, in one thread, whatever the workers are;
so would a step that judges documents, between the encoded blocks and the duplicates.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import CorpusWriter, shorter_than_journal
from full_stack_transformer.datasets.shard_writer import ShardedCorpusWriter, corpus_writer
from full_stack_transformer.documents.blocks import ReadingOptions
from full_stack_transformer.documents.formats import shortened, why_without_documents
from full_stack_transformer.documents.parts import FilePart, parts_of
from full_stack_transformer.errors import DocumentsError
from full_stack_transformer.preparation.encoding import (
    DIGEST_BYTES,
    EncodedBlock,
    EncodingWorkers,
    SampleWriter,
)
from full_stack_transformer.preparation.journal import Journal, Progress, SplitState
from full_stack_transformer.preparation.places import DIGESTS_FILE_NAME, Sending
from full_stack_transformer.preparation.report import ProgressDisplay

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """Input files, and the splits that they become."""

    name: str
    """train or valid: the split that documents go to."""
    files: list[Path]
    validation_fraction: float = 0.0
    """Fraction of the documents that goes to valid instead."""
    directories: tuple[Path, ...] = ()
    """Those that files were found in: of these files some may have no documents."""

    @property
    def splits(self) -> list[str]:
        """The splits that this pass writes."""
        return [self.name, "valid"] if self.validation_fraction else [self.name]


def run_pass(
    file_pass: Pass,
    directory: Path,
    reading: ReadingOptions,
    workers: EncodingWorkers,
    arguments: PrepareDatasetArguments,
    journal: Journal,
    display: ProgressDisplay,
    *,
    vocab_size: int,
    sending: Sending | None = None,
) -> dict[str, SplitState]:
    """Write the corpora of a pass, continuing where the journal ends; the final state of each split."""
    progress = journal.last.get(file_pass.name) or Progress(
        file_pass.name, splits={split: SplitState() for split in file_pass.splits}
    )
    if progress.is_done:
        if sending is not None:
            sending.send(progress)
        return progress.splits
    with contextlib.ExitStack() as stack:
        splits = _Splits(stack, directory, vocab_size, progress, arguments)
        duplicates = None
        if arguments.deduplicate == "exact":
            duplicates = stack.enter_context(
                contextlib.closing(_Duplicates(directory / DIGESTS_FILE_NAME, progress.num_digests))
            )
        stack.enter_context(display.phase(f"encoding {file_pass.name}", file_pass.files))
        _write_blocks(
            file_pass, reading, workers, progress, splits, duplicates, journal, display, sending
        )
    # Recorded now that leaving the stack has completed the files.
    progress.is_done = True
    journal.write(progress)
    if sending is not None:
        sending.send(progress)
    return progress.splits


def _write_blocks(
    file_pass: Pass,
    reading: ReadingOptions,
    workers: EncodingWorkers,
    progress: Progress,
    splits: "_Splits",
    duplicates: "_Duplicates | None",
    journal: Journal,
    display: ProgressDisplay,
    sending: Sending | None,
) -> None:
    counts = progress.splits[file_pass.name].documents
    without: list[Path] = []
    parts = _parts(file_pass, reading, progress, splits.has_open_document, workers.part_bytes)
    with contextlib.closing(workers.encode(parts, display)) as encoded_blocks:
        for encoded in encoded_blocks:
            num_documents = counts.num_documents
            splits.add(encoded, file_pass, duplicates)
            num_documents = counts.num_documents - num_documents
            for num_ended in encoded.ended_files:
                if not progress.num_documents + num_ended:
                    without.append(file_pass.files[progress.file_number])
                    _check_file(without[-1], file_pass, reading)
                    counts.num_files_without_documents += 1
                progress.file_number += 1
                progress.num_documents = 0
                num_documents -= num_ended
            progress.num_documents += num_documents
            progress.position = encoded.block_end
            if journal.is_due or (sending is not None and splits.have_unsent_shards(sending)):
                progress.num_digests = duplicates.flush() if duplicates else 0
                splits.flush()
                journal.write(progress)
                if sending is not None:
                    sending.send(progress)
    if without:
        check_documents(file_pass, reading, len(without), without[0])
        logger.warning(
            "%s: %s of %s files have no documents: %s",
            file_pass.name,
            f"{len(without):,}",
            f"{len(file_pass.files):,}",
            shortened(list(map(str, without))),
        )


def _parts(
    file_pass: Pass,
    reading: ReadingOptions,
    progress: Progress,
    continues: bool,
    part_bytes: int | None,
) -> Iterator[FilePart]:
    """The parts of all files, from where the progress ends."""
    start = progress.position
    for path in file_pass.files[progress.file_number :]:
        yield from parts_of(path, reading, start=start, continues=continues, num_bytes=part_bytes)
        start, continues = 0, False


def _check_file(path: Path, file_pass: Pass, reading: ReadingOptions) -> None:
    """Raise if a file that was named itself has no documents."""
    if not any(directory in path.parents for directory in file_pass.directories):
        raise _without_documents(path, reading)


def check_documents(
    file_pass: Pass, reading: ReadingOptions, num_without: int, first: Path
) -> None:
    """Raise if no file of a pass has documents."""
    if num_without == len(file_pass.files):
        raise _without_documents(first, reading)


def _without_documents(path: Path, reading: ReadingOptions) -> DocumentsError:
    return DocumentsError(
        f"{path}: no document found in {path.stat().st_size:,} bytes: "
        f"{why_without_documents(path, reading)}"
    )


class _Splits:
    """The corpora that a pass writes, with the state of each."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        directory: Path,
        vocab_size: int,
        progress: Progress,
        arguments: PrepareDatasetArguments,
    ) -> None:
        self._states = progress.splits
        self._corpora: dict[str, CorpusWriter | ShardedCorpusWriter] = {}
        self._writers: dict[str, SampleWriter] = {}
        for split, state in progress.splits.items():
            corpus = corpus_writer(
                directory / split,
                vocab_size,
                max_shard_bytes=arguments.shard_bytes,
                num_tokens=state.samples.num_tokens,
                num_samples=state.samples.num_samples,
            )
            stack.enter_context(corpus)
            self._corpora[split] = corpus
            self._writers[split] = SampleWriter(
                self._corpora[split],
                min_sample_length=arguments.min_sample_length,
                max_sample_length=arguments.max_sample_length,
                counts=state.samples,
                open_document=state.open_document,
            )

    @property
    def has_open_document(self) -> bool:
        """Whether a document continues in the next block."""
        return any(state.open_document is not None for state in self._states.values())

    def add(self, encoded: EncodedBlock, file_pass: Pass, duplicates: "_Duplicates | None") -> None:
        """Append the documents of a block to their splits."""
        counts = self._states[file_pass.name].documents
        counts.add(encoded.counts)
        if encoded.drops_open_document:
            self._writers[file_pass.name].drop_open_document()
        is_valid = _goes_to_valid(encoded, file_pass.validation_fraction)
        is_new = np.ones(len(encoded.lengths), dtype=bool)
        if duplicates is not None:
            is_new = duplicates.filter(encoded)
            counts.num_duplicate_documents += int((~is_new).sum())
        self._append(file_pass.name, encoded, is_new & ~is_valid)
        if is_valid.any():
            self._append("valid", encoded, is_new & is_valid)
            self._states["valid"].documents.num_documents += int((is_new & is_valid).sum())
        for split, writer in self._writers.items():
            self._states[split].samples = writer.counts
            self._states[split].open_document = writer.open_document

    def _append(self, split: str, encoded: EncodedBlock, is_wanted: NDArray[np.bool_]) -> None:
        token_ids, lengths, text_bytes = encoded.token_ids, encoded.lengths, encoded.text_bytes
        if not is_wanted.all():
            token_ids = token_ids[np.repeat(is_wanted, lengths)]
            lengths, text_bytes = lengths[is_wanted], text_bytes[is_wanted]
        if len(lengths):
            is_whole = split == "valid" and len(self._writers) > 1  # pieces always go to train
            self._writers[split].add(
                token_ids,
                lengths,
                text_bytes,
                continues=encoded.continues and not is_whole,
                unfinished=encoded.unfinished and not is_whole,
            )

    def have_unsent_shards(self, sending: Sending) -> bool:
        """Whether shards were finished that were not sent to object storage."""
        return any(
            isinstance(corpus, ShardedCorpusWriter)
            and corpus.num_finished > sending.num_sent.get(split, 0)
            for split, corpus in self._corpora.items()
        )

    def flush(self) -> None:
        """Make what was appended durable."""
        for corpus in self._corpora.values():
            corpus.flush()


def _goes_to_valid(encoded: EncodedBlock, fraction: float) -> NDArray[np.bool_]:
    """Whether each document goes to valid, by a hash of its text; pieces of documents never do."""
    if not fraction:
        return np.zeros(len(encoded.lengths), dtype=bool)
    limit = int(fraction * 2**64)
    chosen = [int.from_bytes(digest[8:], "little") < limit for digest in encoded.digests]
    return np.array(chosen, dtype=bool) & ~_is_piece(encoded)


def _is_piece(encoded: EncodedBlock) -> NDArray[np.bool_]:
    is_piece = np.zeros(len(encoded.lengths), dtype=bool)
    if encoded.continues:
        is_piece[0] = True
    if encoded.unfinished:
        is_piece[-1] = True
    return is_piece


class _Duplicates:
    """Hashes of the texts so far; kept in a file next to the journal, for --resume.

    128 bits: among 10^12 documents the probability that two different ones share a hash is below 10^-14. A
    document larger than a block arrives in pieces and never counts as a duplicate.
    """

    def __init__(self, path: Path, num_known: int) -> None:
        self._file = path.open("a+b")
        if os.fstat(self._file.fileno()).st_size < num_known * DIGEST_BYTES:
            raise shorter_than_journal(path)
        self._file.truncate(num_known * DIGEST_BYTES)
        self._file.seek(0)
        known = self._file.read()
        self._seen = {
            known[start : start + DIGEST_BYTES] for start in range(0, len(known), DIGEST_BYTES)
        }

    def filter(self, encoded: EncodedBlock) -> NDArray[np.bool_]:
        """Whether each document is new; remembers the new ones."""
        is_piece = _is_piece(encoded)
        is_new = np.ones(len(encoded.lengths), dtype=bool)
        for index, digest in enumerate(encoded.digests):
            if is_piece[index]:
                continue
            if digest in self._seen:
                is_new[index] = False
            else:
                self._seen.add(digest)
                self._file.write(digest)
        return is_new

    def flush(self) -> int:
        """Make the hashes durable; returns how many there are."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return len(self._seen)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
