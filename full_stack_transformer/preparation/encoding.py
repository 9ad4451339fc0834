"""Blocks -> framed token ids: what a worker does, and the workers.

    reader (this thread) --blocks--> workers: documents, ids, frames --EncodedBlock, in order--> writer

At most a few blocks are under way, so memory does not grow with the input. Threads suffice up to four
workers, as decoding and encoding release the interpreter's lock for much of their time; more are spawned
processes. The results do not depend on the number of workers.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.datasets.corpus import token_dtype
from full_stack_transformer.documents.blocks import Block, DocumentCounts, ReadingOptions
from full_stack_transformer.documents.formats import format_of
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    open_saved_tokenizer,
)
from full_stack_transformer.tokenization.encoders import BackendName, Encoder, make_encoder

MAX_THREADS = 4
DIGEST_BYTES = 16


@dataclass(frozen=True)
class EncodedBlock:
    """Framed documents of a block, one after the other."""

    block_end: int
    token_ids: NDArray[np.unsignedinteger]
    """(tokens,) in the type of the corpus."""
    lengths: NDArray[np.int64]
    """(documents,) tokens of each document, or of the piece of it that is in this block."""
    digests: tuple[bytes, ...]
    """(documents,) hashes of their texts, where they are wanted."""
    counts: DocumentCounts
    continues: bool
    """The first piece belongs to the document that is open."""
    unfinished: bool
    """The last piece leaves its document open."""
    drops_open_document: bool
    """The open document never ended: nothing of it may stay."""


@dataclass(frozen=True)
class BlockEncoderOptions:
    """What a worker needs to know; travels to spawned processes."""

    tokenizer_directory: Path
    backend: BackendName
    reading: ReadingOptions
    with_digests: bool


class BlockEncoder:
    """Turns blocks into framed token ids; may be called by several threads at once."""

    def __init__(
        self, options: BlockEncoderOptions, tokenizer: DocumentTokenizer, encoder: Encoder
    ) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> EncodedBlock:
        """The documents of a block, encoded and framed."""
        found = format_of(block.path, self._options.reading).documents(block)
        drops_open_document = found.has_head and not found.head_ends and not found.has_tail
        begins = np.ones(len(found.texts), dtype=bool)
        ends = np.ones(len(found.texts), dtype=bool)
        if found.has_head and found.texts and not drops_open_document:
            begins[0] = False
        if found.has_tail:
            ends[-1] = False
        encoded = self._encoder.encode(
            framed_texts(found.texts, begins.tolist(), ends.tolist(), self._tokenizer)
        )
        lengths = np.diff(encoded.offsets) + begins + ends
        return EncodedBlock(
            block_end=block.end,
            token_ids=_framed_ids(encoded.token_ids, lengths, begins, ends, self._tokenizer).astype(
                self._dtype, copy=False
            ),
            lengths=lengths,
            digests=tuple(map(_digest, found.texts)) if self._options.with_digests else (),
            counts=found.counts,
            continues=found.has_head and not drops_open_document,
            unfinished=found.has_tail,
            drops_open_document=drops_open_document,
        )


def framed_texts(
    texts: list[str], begins: list[bool], ends: list[bool], tokenizer: DocumentTokenizer
) -> list[str]:
    """The texts as they are encoded: normalized, with what stands before and after a document."""
    before, after = tokenizer.text_before, tokenizer.text_after
    normalize = tokenizer.normalize
    return [
        f"{before if begin else ''}{normalize(text)}{after if end else ''}"
        for text, begin, end in zip(texts, begins, ends, strict=True)
    ]


def _framed_ids(
    token_ids: NDArray[np.uint32],
    lengths: NDArray[np.int64],
    begins: NDArray[np.bool_],
    ends: NDArray[np.bool_],
    tokenizer: DocumentTokenizer,
) -> NDArray[np.uint32]:
    """The ids with begin and end tokens; `lengths` (documents,) counts those."""
    stops = np.cumsum(lengths)
    framed = np.empty(int(stops[-1]) if len(stops) else 0, dtype=np.uint32)
    is_text = np.ones(len(framed), dtype=bool)
    begin_positions, end_positions = (stops - lengths)[begins], (stops - 1)[ends]
    is_text[begin_positions] = is_text[end_positions] = False
    framed[is_text] = token_ids
    framed[begin_positions] = tokenizer.begin_id
    framed[end_positions] = tokenizer.end_id
    return framed


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


class Workers:
    """Encode blocks at the same time; started once for all files of a preparation.

    Args:
        options: what to do.
        tokenizer: the one that the options name, opened.
        encoder: its encoder; threads share it, processes make their own.
        num_workers: threads, or above MAX_THREADS processes.
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
        self._executor: Executor
        self._encode: Callable[[Block], EncodedBlock]
        if num_workers <= MAX_THREADS:
            self._executor = ThreadPoolExecutor(num_workers)
            self._encode = BlockEncoder(options, tokenizer, encoder)
        else:
            # Spawned, never forked: this process has threads.
            self._executor = ProcessPoolExecutor(
                num_workers, get_context("spawn"), initializer=_start_process, initargs=(options,)
            )
            self._encode = _encode_in_process

    def encode(self, blocks: Iterable[Block]) -> Iterator[EncodedBlock]:
        """The blocks, encoded, in their order."""
        under_way: deque[Future[EncodedBlock]] = deque()
        try:
            for block in blocks:
                under_way.append(self._executor.submit(self._encode, block))
                # One more than there are workers, so that none waits for the reader.
                if len(under_way) > self._num_workers + 1:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
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


_encoder_of_process: BlockEncoder | None = None


def _start_process(options: BlockEncoderOptions) -> None:
    global _encoder_of_process
    tokenizer = open_saved_tokenizer(options.tokenizer_directory)
    encoder = make_encoder(tokenizer.backend, options.backend)
    _encoder_of_process = BlockEncoder(options, tokenizer, encoder)


def _encode_in_process(block: Block) -> EncodedBlock:
    assert _encoder_of_process is not None
    return _encoder_of_process(block)
