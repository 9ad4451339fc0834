"""The results of a preparation: description.json, and log lines."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import FORMAT_VERSION, POSITIONS_FILE_NAME, token_dtype
from full_stack_transformer.preparation.journal import SplitState
from full_stack_transformer.preparation.passes import Pass
from full_stack_transformer.storage import file_facts, files_below
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer, class_name
from full_stack_transformer.tokenization.encoders import BackendName

logger = logging.getLogger(__name__)

_NUM_BINS = 8
_BAR_CHARACTERS = 40


def describe(
    arguments: PrepareDatasetArguments,
    tokenizer: DocumentTokenizer,
    backend: BackendName,
    states: dict[str, SplitState],
    passes: Sequence[Pass],
    directory: Path,
    started: float,
) -> dict[str, Any]:
    """The content of description.json, without paths of this machine."""
    inputs = [path for file_pass in passes for path in file_pass.files]
    outputs = files_below(directory)
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        facts = dict(
            zip([*inputs, *outputs], threads.map(file_facts, [*inputs, *outputs]), strict=True)
        )
    return {
        **_portable_options(arguments),
        **{
            f"number_of_{split}_{unit}": getattr(states[split].samples, f"num_{unit}")
            for split in ("train", "valid")
            for unit in ("samples", "tokens")
        },
        "format_version": FORMAT_VERSION,
        "tokenizer_cls_name": class_name(type(tokenizer)),
        "tokenizer_backend": f"{backend} {version(backend)}",
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "special_token_ids": {
            "begin": tokenizer.begin_id,
            "end": tokenizer.end_id,
            "pad": tokenizer.pad_id,
        },
        "counts": _counts(states),
        "sample_lengths": {
            split: _histogram(directory / split, states[split], arguments) for split in states
        },
        "input_files": {
            file_pass.name: [{"name": path.name, **facts[path]} for path in file_pass.files]
            for file_pass in passes
        },
        "output_files": {path.relative_to(directory).as_posix(): facts[path] for path in outputs},
        "package_versions": {
            name: version(name) for name in ("full_stack_transformer", "numpy", "tokenizers")
        },
        "seconds_taken": round(time.perf_counter() - started, 3),
    }


def _portable_options(arguments: PrepareDatasetArguments) -> dict[str, Any]:
    options = dataclasses.asdict(arguments)
    for option in ("documents_train_file", "documents_valid_file"):
        options[option] = [path.name for path in options[option]]
    if options["tokenizer_path"] is not None and Path(options["tokenizer_path"]).is_dir():
        options["tokenizer_path"] = Path(options["tokenizer_path"]).name
    for of_this_run in ("datasets_root", "resume", "num_workers", "allow_code_from"):
        del options[of_this_run]
    return options


def _counts(states: dict[str, SplitState]) -> dict[str, dict[str, int]]:
    """The counts of each split, for the description."""
    return {
        split: {**dataclasses.asdict(state.documents), **dataclasses.asdict(state.samples)}
        for split, state in states.items()
    }


def _histogram(
    directory: Path, state: SplitState, arguments: PrepareDatasetArguments
) -> dict[str, list[int]]:
    """Histogram of sample lengths: `limits` (bins + 1,), the last included, and `counts` (bins,)."""
    starts = np.load(directory / POSITIONS_FILE_NAME, mmap_mode="r")
    limits = np.unique(
        np.linspace(arguments.min_sample_length, arguments.max_sample_length, _NUM_BINS + 1).astype(
            int
        )
    )
    if len(limits) == 1:
        limits = np.append(limits, limits[0] + 1)
    counts = np.zeros(len(limits) - 1, dtype=np.int64)
    at_once = 1 << 20
    for first in range(0, len(starts), at_once):
        part = starts[first : first + at_once + 1]
        is_end = first + at_once >= len(starts)
        lengths = np.diff(part, append=state.samples.num_tokens) if is_end else np.diff(part)
        counts += np.histogram(lengths, limits)[0]
    return {"limits": limits.tolist(), "counts": counts.tolist()}


def log_report(description: dict[str, Any], states: dict[str, SplitState], seconds: float) -> None:
    """Log the counts, the sample lengths and the speed."""
    for split, state in states.items():
        documents, samples = state.documents, state.samples
        notes = [
            f"{count:,} {what}"
            for count, what in (
                (documents.num_empty_documents, "empty documents"),
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
    _log_plot(description["sample_lengths"]["train"])
    num_tokens = sum(state.samples.num_tokens for state in states.values())
    num_bytes = sum(state.documents.num_bytes for state in states.values())
    logger.info(
        "prepared %s tokens in %.1f s, %s tokens/s, %.1f MB/s, %.2f bytes a token, with %s",
        f"{num_tokens:,}",
        seconds,
        f"{num_tokens / seconds:,.0f}",
        num_bytes / seconds / 1e6,
        num_bytes / max(1, num_tokens),
        description["tokenizer_backend"],
    )


def _log_plot(histogram: dict[str, list[int]]) -> None:
    limits, counts = histogram["limits"], histogram["counts"]
    longest = max([*counts, 1])
    width = len(f"{limits[-1]:,}")
    for low, high, count in zip(limits, limits[1:], counts, strict=False):
        bar = "█" * -(-count * _BAR_CHARACTERS // longest)
        logger.info(
            "  %*s–%-*s tokens %s %s", width, f"{low:,}", width, f"{high:,}", bar, f"{count:,}"
        )
