"""`fst prepare_dataset`: documents -> dataset directory.

    files -> blocks -> documents -> framed token ids -> samples -> corpus files

Streams: only a few blocks are in memory. --resume continues an interrupted preparation. Never imports
torch.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.documents.blocks import ReadingOptions
from full_stack_transformer.documents.formats import find_document_files, format_of
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.machine import num_cores
from full_stack_transformer.own_classes import trust_options
from full_stack_transformer.preparation.encoding import BlockEncoderOptions, Workers
from full_stack_transformer.preparation.journal import Journal, SplitState, fingerprint
from full_stack_transformer.preparation.passes import DIGESTS_FILE_NAME, Pass, run_pass
from full_stack_transformer.preparation.report import describe, log_report
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    new_version,
    sync_tree,
    write_json,
)
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    TrainedTokenizer,
    load_tokenizer,
    open_saved_tokenizer,
)
from full_stack_transformer.tokenization.encoders import choose_encoder

logger = logging.getLogger(__name__)

TOKENIZER_DIRECTORY_NAME = "tokenizer"
# Characters of the input on which a fast back end is compared with the reference before it is used.
_MAX_COMPARED_CHARACTERS = 1 << 16


def main(arguments: PrepareDatasetArguments) -> Path:
    """Write a new version of the dataset and return its directory.

    Raises:
        DocumentsError: a file cannot be read, or holds no documents.
        TokenizerError: the tokenizer cannot be opened.
        DatasetError: all samples are shorter than the minimum.
        MachineError: the disk is full.
    """
    started = time.perf_counter()
    trust_options(arguments)
    passes = _passes(arguments)
    # Opened before anything is written, so that a wrong path leaves nothing behind.
    given_tokenizer = _given_tokenizer(arguments)
    mark = _fingerprint(arguments, passes)

    def adopt(directory: Path) -> bool:
        return arguments.resume and Journal.fingerprint_of(directory) == mark

    with new_version(arguments.datasets_root, arguments.dataset_name, adopt=adopt) as dataset:
        tokenizer_directory = dataset.directory / TOKENIZER_DIRECTORY_NAME
        journal = Journal(dataset.directory, mark)
        if journal.last:
            logger.info("resuming the interrupted preparation in %s", dataset.directory)
            tokenizer = open_saved_tokenizer(tokenizer_directory)
        else:
            tokenizer = given_tokenizer or _trained_tokenizer(arguments, passes)
            tokenizer.save(tokenizer_directory, model_max_length=arguments.max_sample_length)
            sync_tree(tokenizer_directory)  # the journal's next line relies on it
        reading = reading_options(arguments, can_cut=tokenizer.can_be_cut)
        encoder = choose_encoder(
            tokenizer.backend, arguments.tokenizer_backend, _first_texts(passes[0], reading)
        )
        options = BlockEncoderOptions(
            tokenizer_directory=tokenizer_directory,
            backend=encoder.name,
            reading=reading,
            with_digests=arguments.deduplicate == "exact" or bool(arguments.validation_fraction),
        )
        states: dict[str, SplitState] = {}
        num_workers = arguments.num_workers or num_cores()
        with Workers(options, tokenizer, encoder, num_workers=num_workers) as workers:
            for file_pass in passes:
                states |= run_pass(
                    file_pass,
                    dataset.directory,
                    reading,
                    workers,
                    arguments,
                    journal,
                    vocab_size=tokenizer.vocab_size,
                )
        _check_samples(states, arguments)
        journal.remove()
        (dataset.directory / DIGESTS_FILE_NAME).unlink(missing_ok=True)
        description = describe(
            arguments, tokenizer, encoder.name, states, passes, dataset.directory, started
        )
        write_json(dataset.directory / DESCRIPTION_FILE_NAME, description)
    log_report(description, states, time.perf_counter() - started)
    return dataset.directory


def _passes(arguments: PrepareDatasetArguments) -> list[Pass]:
    """The input files, by the splits that they become."""
    train = find_document_files(arguments.documents_train_file, "--documents_train_file")
    if not arguments.documents_valid_file:
        return [Pass("train", train, arguments.validation_fraction)]
    valid = find_document_files(arguments.documents_valid_file, "--documents_valid_file")
    return [Pass("train", train), Pass("valid", valid)]


def _fingerprint(arguments: PrepareDatasetArguments, passes: list[Pass]) -> str:
    options = dataclasses.asdict(arguments)
    for without_effect in ("resume", "num_workers", "allow_code_from"):
        del options[without_effect]
    files = [
        (file_pass.name, path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for file_pass in passes
        for path in file_pass.files
    ]
    return fingerprint(
        {"options": options, "files": files, "version": version("full_stack_transformer")}
    )


def reading_options(arguments: PrepareDatasetArguments, *, can_cut: bool) -> ReadingOptions:
    """How the files are read."""
    return ReadingOptions(
        end_of_document=arguments.end_of_document,
        strip_lines=arguments.strip_lines,
        text_field=arguments.text_field,
        encoding_errors=arguments.encoding_errors,
        can_cut=can_cut,
    )


def _given_tokenizer(arguments: PrepareDatasetArguments) -> DocumentTokenizer | None:
    if arguments.tokenizer_cls_name is None and arguments.tokenizer_path is None:
        return None
    return load_tokenizer(arguments.tokenizer_cls_name, arguments.tokenizer_path)


def _trained_tokenizer(arguments: PrepareDatasetArguments, passes: list[Pass]) -> DocumentTokenizer:
    train = passes[0]
    logger.info(
        "training a byte-level BPE of %s tokens on %s",
        f"{arguments.vocab_size:,}",
        ", ".join(str(path) for path in arguments.documents_train_file),
    )
    texts = _texts(train, reading_options(arguments, can_cut=True))
    return TrainedTokenizer.train(texts, vocab_size=arguments.vocab_size)


def _texts(file_pass: Pass, reading: ReadingOptions) -> Generator[str, None, None]:
    for path in file_pass.files:
        document_format = format_of(path, reading)
        with contextlib.closing(document_format.blocks(path, start=0, continues=False)) as blocks:
            for block in blocks:
                yield from document_format.documents(block).texts


def _first_texts(file_pass: Pass, reading: ReadingOptions) -> list[str]:
    texts: list[str] = []
    num_characters = 0
    with contextlib.closing(_texts(file_pass, reading)) as reader:
        for text in reader:
            texts.append(text[: _MAX_COMPARED_CHARACTERS - num_characters])
            num_characters += len(texts[-1])
            if num_characters >= _MAX_COMPARED_CHARACTERS:
                break
    return texts


def _check_samples(states: dict[str, SplitState], arguments: PrepareDatasetArguments) -> None:
    for split, state in states.items():
        if state.samples.num_samples:
            continue
        raise DatasetError(
            f"no {split} sample is left: {state.documents.num_documents:,} documents gave only "
            f"{state.samples.num_dropped_samples:,} samples shorter than --min_sample_length "
            f"{arguments.min_sample_length}; lower it, or supply more or longer documents"
        )
