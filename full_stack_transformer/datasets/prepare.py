"""`fst prepare_dataset`: documents -> dataset directory.

    documents -> framed token ids -> samples of at most max_sample_length tokens -> corpus files

Streams: only a block of documents is in memory. Never imports torch.
"""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import CorpusWriter, token_dtype
from full_stack_transformer.datasets.description import FORMAT_VERSION
from full_stack_transformer.documents import DocumentCounts, DocumentReader
from full_stack_transformer.errors import DatasetError, DocumentsError
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    file_facts,
    new_version,
    write_json,
)
from full_stack_transformer.tokenization import (
    DocumentTokenizer,
    TrainedTokenizer,
    class_name,
    load_tokenizer,
)

logger = logging.getLogger(__name__)

# Documents are encoded in blocks of about so many characters: enough to keep the encoder's threads
# busy, little enough that giant documents do not add up.
_BLOCK_CHARACTERS = 1 << 20


@dataclass
class SplitCounts:
    """What became of the documents of one half, train or valid."""

    documents: DocumentCounts
    num_samples: int = 0
    num_tokens: int = 0
    num_dropped_samples: int = 0
    num_dropped_tokens: int = 0


def prepare_dataset(arguments: PrepareDatasetArguments) -> Path:
    """Write a new version of the dataset and return its directory.

    Raises:
        DocumentsError: a file cannot be read, or never holds the delimiter.
        TokenizerError: the tokenizer cannot be opened.
        DatasetError: no sample is left after the length rule.
    """
    started = time.perf_counter()
    sources = {"train": arguments.documents_train_file, "valid": arguments.documents_valid_file}
    for path in sources.values():
        if not path.is_file():
            raise DocumentsError(
                f"{path} does not exist, or is no file; expected a text file of documents"
            )
    tokenizer = _make_tokenizer(arguments)
    with new_version(arguments.datasets_root, arguments.dataset_name) as dataset:
        tokenizer.save(
            dataset.directory / "tokenizer", model_max_length=arguments.max_sample_length
        )
        counts = {
            split: _write_split(
                _reader(arguments, path), tokenizer, dataset.directory / split, arguments
            )
            for split, path in sources.items()
        }
        seconds = time.perf_counter() - started
        description = _describe(arguments, tokenizer, counts, dataset.directory, seconds)
        write_json(dataset.directory / DESCRIPTION_FILE_NAME, description)
    _report(counts, time.perf_counter() - started)
    return dataset.directory


def split_into_samples(
    token_ids: Sequence[int], *, max_sample_length: int
) -> Iterator[Sequence[int]]:
    """Cut the tokens of a document into consecutive samples of `max_sample_length`, the last shorter."""
    for start in range(0, len(token_ids), max_sample_length):
        yield token_ids[start : start + max_sample_length]


def _make_tokenizer(arguments: PrepareDatasetArguments) -> DocumentTokenizer:
    if arguments.tokenizer_cls_name is None and arguments.tokenizer_path is None:
        logger.info(
            "training a byte-level BPE of %s tokens on %s",
            f"{arguments.vocab_size:,}",
            arguments.documents_train_file,
        )
        documents = _reader(arguments, arguments.documents_train_file)
        return TrainedTokenizer.train(documents, vocab_size=arguments.vocab_size)
    return load_tokenizer(arguments.tokenizer_cls_name, arguments.tokenizer_path)


def _reader(arguments: PrepareDatasetArguments, path: Path) -> DocumentReader:
    return DocumentReader(
        path, end_of_document=arguments.end_of_document, strip_lines=arguments.strip_lines
    )


def _write_split(
    reader: DocumentReader,
    tokenizer: DocumentTokenizer,
    directory: Path,
    arguments: PrepareDatasetArguments,
) -> SplitCounts:
    counts = SplitCounts(reader.counts)
    with CorpusWriter(directory, tokenizer.vocab_size) as corpus:
        for documents in _blocks(reader):
            kept: list[Sequence[int]] = []
            for token_ids in tokenizer.encode_documents(documents):
                for sample in split_into_samples(
                    token_ids, max_sample_length=arguments.max_sample_length
                ):
                    if len(sample) >= arguments.min_sample_length:
                        kept.append(sample)
                    else:
                        counts.num_dropped_samples += 1
                        counts.num_dropped_tokens += len(sample)
            corpus.append(kept)
        counts.num_samples, counts.num_tokens = corpus.num_samples, corpus.num_tokens
    if counts.num_samples == 0:
        raise DatasetError(
            f"{reader.path}: no sample is left: {reader.counts.num_documents:,} documents gave only "
            f"{counts.num_dropped_samples:,} samples shorter than --min_sample_length "
            f"{arguments.min_sample_length}; lower it, or supply longer documents"
        )
    return counts


def _blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    num_characters = 0
    for document in documents:
        block.append(document)
        num_characters += len(document)
        if num_characters >= _BLOCK_CHARACTERS:
            yield block
            block, num_characters = [], 0
    if block:
        yield block


def _describe(
    arguments: PrepareDatasetArguments,
    tokenizer: DocumentTokenizer,
    counts: dict[str, SplitCounts],
    directory: Path,
    seconds: float,
) -> dict[str, Any]:
    options = dataclasses.asdict(arguments)
    # The place on this machine says nothing on another one: names only.
    for option in ("documents_train_file", "documents_valid_file"):
        options[option] = options[option].name
    if options["tokenizer_path"] is not None and Path(options["tokenizer_path"]).is_dir():
        options["tokenizer_path"] = Path(options["tokenizer_path"]).name
    del options["datasets_root"]
    inputs = (arguments.documents_train_file, arguments.documents_valid_file)
    outputs = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        **options,
        **{
            f"number_of_{split}_{unit}": getattr(split_counts, f"num_{unit}")
            for split, split_counts in counts.items()
            for unit in ("samples", "tokens")
        },
        "format_version": FORMAT_VERSION,
        "tokenizer_cls_name": class_name(type(tokenizer)),
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "special_token_ids": {
            "begin": tokenizer.begin_id,
            "end": tokenizer.end_id,
            "pad": tokenizer.pad_id,
        },
        "counts": {
            split: dataclasses.asdict(split_counts) for split, split_counts in counts.items()
        },
        "input_files": {
            split: {"name": path.name, **file_facts(path)}
            for split, path in zip(counts, inputs, strict=True)
        },
        "output_files": {
            path.relative_to(directory).as_posix(): file_facts(path) for path in outputs
        },
        "package_versions": {
            name: version(name) for name in ("full_stack_transformer", "numpy", "tokenizers")
        },
        "seconds_taken": round(seconds, 3),
    }


def _report(counts: dict[str, SplitCounts], seconds: float) -> None:
    num_tokens = sum(split_counts.num_tokens for split_counts in counts.values())
    for split, split_counts in counts.items():
        logger.info(
            "%s: %s documents, %s samples, %s tokens; dropped %s samples (%s tokens) that were too short",
            split,
            f"{split_counts.documents.num_documents:,}",
            f"{split_counts.num_samples:,}",
            f"{split_counts.num_tokens:,}",
            f"{split_counts.num_dropped_samples:,}",
            f"{split_counts.num_dropped_tokens:,}",
        )
    logger.info(
        "prepared %s tokens in %.1f s, %s tokens/s",
        f"{num_tokens:,}",
        seconds,
        f"{num_tokens / seconds:,.0f}",
    )
