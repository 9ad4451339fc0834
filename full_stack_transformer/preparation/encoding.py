"""Files -> framed token ids, by workers; framed documents -> samples of a corpus.

    reader (this thread) --blocks--> workers: documents, ids, frames --EncodedBlock, in order--> SampleWriter

The workers of a cluster read for themselves (`ray_workers`). Only a few blocks are in memory at a time, or
one that is large. Small files share a call of a worker. Up to four workers are threads, as decoding and
encoding release the interpreter's lock most of the time; more are spawned processes. The results do not
depend on the workers.

A document is cut into consecutive samples of `max_sample_length` tokens, the last one shorter; samples
shorter than `min_sample_length` are dropped and counted.
"""

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer import interruption
from full_stack_transformer.datasets.corpus import CorpusWriter, token_dtype
from full_stack_transformer.datasets.shard_writer import ShardedCorpusWriter
from full_stack_transformer.documents.blocks import (
    BLOCK_BYTES,
    Block,
    DocumentCounts,
    Documents,
    ReadingOptions,
)
from full_stack_transformer.documents.formats import format_of
from full_stack_transformer.documents.parts import FilePart, blocks_of
from full_stack_transformer.own_classes import trust, trusted_modules
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    open_saved_tokenizer,
)
from full_stack_transformer.tokenization.encoders import (
    BackendName,
    EncodedTexts,
    Encoder,
    make_encoder,
    pieces,
)

MAX_THREADS = 4
DIGEST_BYTES = 16
# Of blocks that are read but not yet encoded.
_MAX_PENDING_BYTES = 1 << 25


@dataclass(frozen=True)
class EncodedBlock:
    """Framed documents of a block, or of several small ones, concatenated."""

    block_end: int
    """Where the next block begins in its file; 0 if that is another file."""
    token_ids: NDArray[np.unsignedinteger]
    """(tokens,) in the type of the corpus."""
    lengths: NDArray[np.int64]
    """(documents,) tokens of each document, or of the piece of it that is in this block."""
    text_bytes: NDArray[np.int64]
    """(documents,) bytes of the texts."""
    digests: tuple[bytes, ...]
    """(documents,) hashes of their texts; empty without --deduplicate and --validation_fraction."""
    counts: DocumentCounts
    ended_files: tuple[int, ...]
    """Of each file that ends here, the documents that are here; the rest is of the file that goes on."""
    continues: bool
    """The first piece belongs to the document that is open."""
    unfinished: bool
    """The last piece leaves its document open."""
    drops_open_document: bool
    """The open document has no end: all of its samples are dropped."""


@dataclass(frozen=True)
class BlockEncoderOptions:
    """Options of a worker; sent to spawned processes."""

    tokenizer_directory: Path
    backend: BackendName
    reading: ReadingOptions
    with_digests: bool


class BlockEncoder:
    """Turns blocks into framed token ids; several threads may call it at the same time."""

    def __init__(
        self, options: BlockEncoderOptions, tokenizer: DocumentTokenizer, encoder: Encoder
    ) -> None:
        self.reading = options.reading
        self._options = options
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, blocks: Sequence[Block]) -> EncodedBlock:
        """The documents of a block, or of several small ones, encoded and framed."""
        found = [format_of(block.path, self._options.reading).documents(block) for block in blocks]
        counts = DocumentCounts()
        for documents in found:
            counts.add(documents.counts)
        texts = [text for documents in found for text in documents.texts]
        first, last = found[0], found[-1]
        drops_open_document = first.has_head and not first.head_ends and not first.has_tail
        begins = np.ones(len(texts), dtype=bool)
        ends = np.ones(len(texts), dtype=bool)
        if first.has_head and texts and not drops_open_document:
            begins[0] = False
        if last.has_tail:
            ends[-1] = False
        encoded = self._encode(framed_texts(texts, begins.tolist(), ends.tolist(), self._tokenizer))
        lengths = np.diff(encoded.offsets) + begins * len(self._tokenizer.prefix_ids) + ends
        return EncodedBlock(
            block_end=0 if blocks[-1].is_last else blocks[-1].end,
            token_ids=_framed_ids(encoded.token_ids, lengths, begins, ends, self._tokenizer).astype(
                self._dtype, copy=False
            ),
            lengths=lengths,
            text_bytes=np.array([_num_bytes(text) for text in texts], dtype=np.int64),
            digests=tuple(map(_digest, texts)) if self._options.with_digests else (),
            counts=counts,
            ended_files=_ended_files(blocks, found),
            continues=first.has_head and not drops_open_document,
            unfinished=last.has_tail,
            drops_open_document=drops_open_document,
        )

    def _encode(self, texts: list[str]) -> EncodedTexts:
        """The ids of the texts; long ones are encoded in pieces where that gives the same ids."""
        is_long = max(map(len, texts), default=0) > 2 * BLOCK_BYTES
        if not is_long or not self._tokenizer.can_be_cut:
            return self._encoder.encode(texts)
        lengths = np.zeros(len(texts), dtype=np.int64)
        ids: list[NDArray[np.unsignedinteger]] = []
        for index, text in enumerate(texts):
            for piece in pieces(text, BLOCK_BYTES):
                piece_ids = self._encoder.encode([piece]).token_ids
                lengths[index] += len(piece_ids)
                ids.append(piece_ids.astype(self._dtype))
        return EncodedTexts(np.concatenate(ids), np.concatenate(([0], np.cumsum(lengths))))


def _ended_files(blocks: Sequence[Block], found: Sequence[Documents]) -> tuple[int, ...]:
    ended: list[int] = []
    num_documents = 0
    for block, documents in zip(blocks, found, strict=True):
        num_documents += documents.counts.num_documents
        if block.is_last:
            ended.append(num_documents)
            num_documents = 0
    return tuple(ended)


def framed_texts(
    texts: list[str], begins: list[bool], ends: list[bool], tokenizer: DocumentTokenizer
) -> list[str]:
    """The texts to encode: normalized, with the tokenizer's text before and after each document."""
    before, after = tokenizer.text_before, tokenizer.text_after
    normalize = tokenizer.normalize
    if not before and not after:  # without a copy
        return list(map(normalize, texts))
    return [
        f"{before if begin else ''}{normalize(text)}{after if end else ''}"
        for text, begin, end in zip(texts, begins, ends, strict=True)
    ]


def _framed_ids(
    token_ids: NDArray[np.unsignedinteger],
    lengths: NDArray[np.int64],
    begins: NDArray[np.bool_],
    ends: NDArray[np.bool_],
    tokenizer: DocumentTokenizer,
) -> NDArray[np.unsignedinteger]:
    """The ids with what stands before a document and its end token; `lengths` (documents,) counts those."""
    stops = np.cumsum(lengths)
    framed = np.empty(int(stops[-1]) if len(stops) else 0, dtype=token_ids.dtype)
    is_text = np.ones(len(framed), dtype=bool)
    begin_positions, end_positions = (stops - lengths)[begins], (stops - 1)[ends]
    framed[end_positions] = tokenizer.end_id
    is_text[end_positions] = False
    for index, token_id in enumerate(tokenizer.prefix_ids):
        framed[begin_positions + index] = token_id
        is_text[begin_positions + index] = False
    framed[is_text] = token_ids
    return framed


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


class Display(Protocol):
    """Shows which file is read, and how far."""

    def begin_file(self, path: Path, position: int = 0) -> None:
        """The next positions are of this file."""
        ...

    def advance_to(self, position: int) -> None:
        """The file has been read up to `position`."""
        ...


class EncodingWorkers(Protocol):
    """Encode files in parallel: `Workers` on this machine, `RayWorkers` on a cluster."""

    part_bytes: int | None
    """Parts of about this size are wanted; None: whole files."""

    def encode(
        self, parts: Iterable[FilePart], display: Display
    ) -> Generator[EncodedBlock, None, None]:
        """The documents of the parts, encoded, in their order."""
        ...


class Workers:
    """Encode blocks in parallel; started once for all files of a preparation.

    Args:
        options: sent to each process.
        tokenizer: the opened tokenizer of the options.
        encoder: its encoder; threads share it, processes make their own.
        num_workers: number of threads, or of processes if above MAX_THREADS.
    """

    def __init__(
        self,
        options: BlockEncoderOptions,
        tokenizer: DocumentTokenizer,
        encoder: Encoder,
        *,
        num_workers: int,
    ) -> None:
        self._num_workers = num_workers
        self._reading = options.reading
        self._executor: Executor
        self._encode: Callable[[Sequence[Block]], EncodedBlock]
        if num_workers <= MAX_THREADS:
            self._executor = ThreadPoolExecutor(num_workers)
            self._encode = BlockEncoder(options, tokenizer, encoder)
        else:
            # Spawned, never forked: this process has threads.
            self._executor = ProcessPoolExecutor(
                num_workers,
                get_context("spawn"),
                initializer=_start_process,
                initargs=(options, trusted_modules()),
            )
            self._encode = _encode_in_process

    part_bytes: int | None = None

    def encode(
        self, parts: Iterable[FilePart], display: Display
    ) -> Generator[EncodedBlock, None, None]:
        """The documents of the parts, encoded, in their order."""
        pending: deque[tuple[Future[EncodedBlock], int]] = deque()
        num_held = 0
        blocks = _shown_blocks(parts, self._reading, display)
        try:
            for group in groups(blocks):
                size = sum(block.num_held for block in group)
                # Processes start with the first; Ctrl-C, which a terminal sends them too, is for this one.
                with interruption.held():
                    future = self._executor.submit(self._encode, tuple(group))
                pending.append((future, size))
                num_held += size
                group.clear()  # not kept while the next is read
                # One more than workers, so that no worker waits for the reader.
                while pending and (
                    len(pending) > self._num_workers + 1 or num_held > _MAX_PENDING_BYTES
                ):
                    future, size = pending.popleft()
                    num_held -= size
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            blocks.close()
            for future, _ in pending:
                future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _shown_blocks(
    parts: Iterable[FilePart], reading: ReadingOptions, display: Display
) -> Generator[Block, None, None]:
    for part in parts:
        display.begin_file(part.path, part.start)
        with contextlib.closing(blocks_of(part, reading)) as blocks:
            for block in blocks:
                display.advance_to(block.end)
                yield block
                del block


def groups(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """The blocks, small ones of whole documents together up to the size of a block, also of several files.

    A hand-over to a worker takes longer than encoding a small file.
    """
    group: list[Block] = []
    size = 0
    for block in blocks:
        is_apart = block.continues or block.unfinished or size + block.num_held > BLOCK_BYTES
        if group and is_apart:
            yield group
            group, size = [], 0
        group.append(block)
        size += block.num_held
        is_large = block.continues or block.unfinished or size >= BLOCK_BYTES
        del block  # not kept while the next is read
        if is_large:
            yield group
            group, size = [], 0
    if group:
        yield group


_encoder_of_process: BlockEncoder | None = None


def _start_process(options: BlockEncoderOptions, trusted: tuple[str, ...]) -> None:
    global _encoder_of_process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    trust(trusted)
    tokenizer = open_saved_tokenizer(options.tokenizer_directory)
    encoder = make_encoder(tokenizer.backend, options.backend)
    _encoder_of_process = BlockEncoder(options, tokenizer, encoder)


def _end_with_parent() -> None:
    """A killed preparation leaves no processes behind."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_process(blocks: Sequence[Block]) -> EncodedBlock:
    assert _encoder_of_process is not None
    return _encoder_of_process(blocks)


@dataclass
class SampleCounts:
    """Samples written and dropped."""

    num_samples: int = 0
    num_tokens: int = 0
    num_dropped_samples: int = 0
    num_dropped_tokens: int = 0
    num_text_bytes: int = 0
    """Bytes of the texts that became the tokens, also the dropped ones."""


@dataclass
class OpenDocument:
    """A document whose end is in a later block."""

    rest: list[int] = field(default_factory=list)
    """Its last tokens, fewer than a sample has."""
    counts_before: SampleCounts = field(default_factory=SampleCounts)
    """The counts before it began."""


class SampleWriter:
    """Cuts documents into samples and appends them to a corpus."""

    def __init__(
        self,
        corpus: CorpusWriter | ShardedCorpusWriter,
        *,
        min_sample_length: int,
        max_sample_length: int,
        counts: SampleCounts | None = None,
        open_document: OpenDocument | None = None,
    ) -> None:
        self._corpus = corpus
        self._min_length, self._max_length = min_sample_length, max_sample_length
        self.counts = counts or SampleCounts()
        self.open_document = open_document

    def add(
        self,
        token_ids: NDArray[np.unsignedinteger],
        lengths: NDArray[np.int64],
        text_bytes: NDArray[np.int64],
        *,
        continues: bool = False,
        unfinished: bool = False,
    ) -> None:
        """Append the samples of documents.

        Args:
            token_ids: (tokens,) of all documents, concatenated.
            lengths: (documents,) tokens of each.
            text_bytes: (documents,) bytes of the text of each.
            continues: the first document continues the open one.
            unfinished: the last document stays open.
        """
        counts_before = SampleCounts(**vars(self.counts))
        if continues:
            assert self.open_document is not None, "a piece belongs to an open document"
            counts_before = self.open_document.counts_before
            rest = np.array(self.open_document.rest, dtype=token_ids.dtype)
            token_ids = np.concatenate((rest, token_ids))
            lengths = lengths.copy()
            lengths[0] += len(rest)
            self.open_document = None
        if unfinished:
            num_rest = int(lengths[-1]) % self._max_length
            rest_ids = token_ids[len(token_ids) - num_rest :].tolist()
            token_ids = token_ids[: len(token_ids) - num_rest]
            lengths = lengths.copy()
            lengths[-1] -= num_rest
            is_new = not (continues and len(lengths) == 1)
        self._append(token_ids, lengths)
        self.counts.num_text_bytes += int(text_bytes.sum())
        if unfinished:
            if is_new:
                # Only whole samples of it were appended, so the counts before it are known.
                num_own = int(lengths[-1])
                counts_before = SampleCounts(**vars(self.counts))
                counts_before.num_tokens -= num_own
                counts_before.num_samples -= num_own // self._max_length
                counts_before.num_text_bytes -= int(text_bytes[-1])
            self.open_document = OpenDocument(rest_ids, counts_before)

    def drop_open_document(self) -> None:
        """Forget the open document and all of its samples."""
        assert self.open_document is not None, "only an open document can be dropped"
        self.counts = self.open_document.counts_before
        self._corpus.cut(num_tokens=self.counts.num_tokens, num_samples=self.counts.num_samples)
        self.open_document = None

    def _append(self, token_ids: NDArray[np.unsignedinteger], lengths: NDArray[np.int64]) -> None:
        sample_lengths = split_lengths(lengths, self._max_length)
        is_short = sample_lengths < self._min_length
        if is_short.any():
            self.counts.num_dropped_samples += int(is_short.sum())
            self.counts.num_dropped_tokens += int(sample_lengths[is_short].sum())
            token_ids = token_ids[~np.repeat(is_short, sample_lengths)]
            sample_lengths = sample_lengths[~is_short]
        self._corpus.append(token_ids, sample_lengths)
        self.counts.num_samples += len(sample_lengths)
        self.counts.num_tokens += len(token_ids)


def split_lengths(lengths: NDArray[np.int64], max_sample_length: int) -> NDArray[np.int64]:
    """Lengths (samples,) of the samples of documents of `lengths` (documents,)."""
    num_full, rest = np.divmod(lengths, max_sample_length)
    num_samples = num_full + (rest > 0)
    sample_lengths = np.full(int(num_samples.sum()), max_sample_length, dtype=np.int64)
    last_samples = np.cumsum(num_samples) - 1
    sample_lengths[last_samples[rest > 0]] = rest[rest > 0]
    return sample_lengths
