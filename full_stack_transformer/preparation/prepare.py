"""`fst prepare_dataset`: documents -> dataset directory; of conversations `conversations` makes one.

    files -> blocks -> documents -> framed token ids -> samples -> corpus files

Streams: only a few blocks are in memory. --resume continues an interrupted preparation. --ray_address
encodes on a cluster, with the same result. Never imports torch.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.documents.blocks import ReadingOptions
from full_stack_transformer.documents.formats import (
    StreamCopies,
    find_document_files,
    format_of,
)
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.machine import num_cores
from full_stack_transformer.own_classes import trust_options
from full_stack_transformer.preparation.conversations import prepare_conversations
from full_stack_transformer.preparation.encoding import (
    BlockEncoderOptions,
    EncodingWorkers,
    Workers,
)
from full_stack_transformer.preparation.journal import Journal, SplitState, fingerprint
from full_stack_transformer.preparation.passes import (
    Pass,
    check_documents,
    run_pass,
)
from full_stack_transformer.preparation.places import Sending, open_version
from full_stack_transformer.preparation.ray_workers import RayWorkers
from full_stack_transformer.preparation.report import (
    ProgressDisplay,
    describe,
    log_report,
    sending_of,
)
from full_stack_transformer.ray_cluster import Cluster, connected
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    sync_tree,
    write_json,
)
from full_stack_transformer.tokenization.chat import keep_chat_template
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    TrainedTokenizer,
    load_tokenizer,
    local_tokenizer,
    open_saved_tokenizer,
)
from full_stack_transformer.tokenization.encoders import choose_encoder, what_is_lost

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
    if arguments.conversations or arguments.preferences:
        return prepare_conversations(arguments)
    started = time.perf_counter()
    trust_options(arguments)
    with contextlib.ExitStack() as stack:
        copies = stack.enter_context(StreamCopies())
        display = stack.enter_context(ProgressDisplay())
        with display.phase("looking for files"):
            passes = _passes(arguments, copies)
            for file_pass in passes:
                _find_document(file_pass, reading_options(arguments, can_cut=True))
        # Opened before anything is written, so that a wrong path leaves nothing behind.
        given_tokenizer = _given_tokenizer(arguments)
        cluster = None
        if arguments.ray_address is not None:
            with display.phase("connecting to Ray"):
                cluster = stack.enter_context(connected(arguments.ray_address))
        mark = _fingerprint(arguments, passes)
        with open_version(arguments, mark=mark) as dataset:
            journal = Journal(dataset.directory, mark)
            sending = sending_of(dataset, arguments)
            tokenizer = _tokenizer(
                arguments, given_tokenizer, passes, dataset.directory, journal, display
            )
            description, states = _prepare(
                arguments,
                tokenizer,
                passes,
                dataset.directory,
                journal,
                display,
                started,
                cluster,
                sending,
            )
            write_json(dataset.directory / DESCRIPTION_FILE_NAME, description)
    log_report(description, states, time.perf_counter() - started)
    return dataset.directory


def _tokenizer(
    arguments: PrepareDatasetArguments,
    given: DocumentTokenizer | None,
    passes: list[Pass],
    directory: Path,
    journal: Journal,
    display: ProgressDisplay,
) -> DocumentTokenizer:
    """The tokenizer of the dataset, which is saved in it."""
    tokenizer_directory = directory / TOKENIZER_DIRECTORY_NAME
    if journal.last:
        logger.info("resuming the interrupted preparation in %s", directory)
        return open_saved_tokenizer(tokenizer_directory)
    tokenizer = given or _trained_tokenizer(arguments, passes, display)
    tokenizer.save(tokenizer_directory, model_max_length=arguments.max_sample_length)
    if arguments.tokenizer_path is not None:
        keep_chat_template(local_tokenizer(arguments.tokenizer_path), tokenizer_directory)
    sync_tree(tokenizer_directory)  # the journal's next line relies on it
    lost = what_is_lost(tokenizer.backend)
    if lost is not None:
        logger.warning("the tokenizer has no token for %s; they are left out of the samples", lost)
    return tokenizer


def _prepare(
    arguments: PrepareDatasetArguments,
    tokenizer: DocumentTokenizer,
    passes: list[Pass],
    directory: Path,
    journal: Journal,
    display: ProgressDisplay,
    started: float,
    cluster: Cluster | None,
    sending: Sending | None,
) -> tuple[dict[str, Any], dict[str, SplitState]]:
    """Write the corpora; the description, and the final state of each split."""
    reading = reading_options(arguments, can_cut=tokenizer.can_be_cut)
    with display.phase("choosing the encoder"):
        encoder = choose_encoder(
            tokenizer.backend, arguments.tokenizer_backend, _first_texts(passes[0], reading)
        )
    options = BlockEncoderOptions(
        tokenizer_directory=directory / TOKENIZER_DIRECTORY_NAME,
        backend=encoder.name,
        reading=reading,
        with_digests=arguments.deduplicate == "exact" or bool(arguments.validation_fraction),
    )
    states: dict[str, SplitState] = {}
    with contextlib.ExitStack() as stack:
        workers: EncodingWorkers
        if cluster is not None:
            total_bytes = sum(path.stat().st_size for found in passes for path in found.files)
            workers = RayWorkers(options, cluster, total_bytes=total_bytes)
        else:
            num_workers = arguments.num_workers or num_cores()
            workers = stack.enter_context(
                Workers(options, tokenizer, encoder, num_workers=num_workers)
            )
        for file_pass in passes:
            states |= run_pass(
                file_pass,
                directory,
                reading,
                workers,
                arguments,
                journal,
                display,
                vocab_size=tokenizer.vocab_size,
                sending=sending,
            )
    _check_samples(states, arguments)
    input_files = {file_pass.name: file_pass.files for file_pass in passes}
    description = describe(
        arguments,
        tokenizer,
        encoder.name,
        states,
        input_files,
        directory,
        started,
        display,
        sending,
    )
    return description, states


def _passes(arguments: PrepareDatasetArguments, copies: StreamCopies) -> list[Pass]:
    """The input files, by the splits that they become."""

    def files_of(name: str, paths: tuple[Path, ...], fraction: float) -> Pass:
        files = find_document_files(paths, f"--documents_{name}_file", copies)
        return Pass(name, files, fraction, tuple(path for path in paths if path.is_dir()))

    passes = [files_of("train", arguments.documents_train_file, arguments.validation_fraction)]
    if arguments.documents_valid_file:
        passes.append(files_of("valid", arguments.documents_valid_file, 0))
    return passes


def _find_document(file_pass: Pass, reading: ReadingOptions) -> None:
    """Raise if there is no document, before anything takes long; usually the first block has one."""
    for path in file_pass.files:
        document_format = format_of(path, reading)
        with contextlib.closing(document_format.blocks(path, start=0, continues=False)) as blocks:
            if any(document_format.documents(block).counts.num_documents for block in blocks):
                return
    check_documents(file_pass, reading, len(file_pass.files), file_pass.files[0])


def _fingerprint(arguments: PrepareDatasetArguments, passes: list[Pass]) -> str:
    options = dataclasses.asdict(arguments)
    for without_effect in ("resume", "num_workers", "ray_address", "allow_code_from"):
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


def _trained_tokenizer(
    arguments: PrepareDatasetArguments, passes: list[Pass], display: ProgressDisplay
) -> DocumentTokenizer:
    train = passes[0]
    logger.info(
        "training a byte-level BPE of %s tokens on %s",
        f"{arguments.vocab_size:,}",
        ", ".join(str(path) for path in arguments.documents_train_file),
    )
    texts = _texts(train, reading_options(arguments, can_cut=True), display)
    with display.phase("training the tokenizer", train.files):
        return TrainedTokenizer.train(texts, vocab_size=arguments.vocab_size)


def _texts(
    file_pass: Pass, reading: ReadingOptions, display: ProgressDisplay | None = None
) -> Generator[str, None, None]:
    """The texts of all files, documents or pieces of them."""
    for path in file_pass.files:
        document_format = format_of(path, reading)
        if display is not None:
            display.begin_file(path)
        with contextlib.closing(document_format.blocks(path, start=0, continues=False)) as blocks:
            for block in blocks:
                if display is not None:
                    display.advance_to(block.end)
                found = document_format.documents(block)
                del block
                found.texts.reverse()
                while found.texts:  # taken out, as a document may be large
                    yield found.texts.pop()


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
        num_documents = state.documents.num_documents
        if not num_documents:
            # Without a file of its own, or the pass had raised.
            num_train = states["train"].documents.num_documents
            raise DatasetError(
                f"no document was chosen for validation: --validation_fraction takes whole documents, and "
                f"there {'is 1' if num_train == 1 else f'are {num_train:,}'} (never one above 1 MB of "
                f"delimited text); divide the text with lines {arguments.end_of_document!r}, for instance "
                "between chapters, or name texts with --documents_valid_file"
            )
        raise DatasetError(
            f"no {split} sample is left: {num_documents:,} documents gave only "
            f"{state.samples.num_dropped_samples:,} samples shorter than --min_sample_length "
            f"{arguments.min_sample_length}; lower it, or supply more or longer documents"
        )
