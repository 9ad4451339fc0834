"""Documents and rows, and the dataset directories that the program makes of them.

documents/    made here: delimited text, JSON Lines, gzip, Parquet
collected/    by fst collect_documents
rows/         some of the collected rows
datasets/     by fst prepare_dataset
"""

import gzip
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.behaviour.commands import fst
from tests.behaviour.facts import Facts, hash_files, read_json, sha256
from tests.behaviour.steps import Step

ROW_TASKS = (
    "sequence_classification",
    "token_labelling",
    "multiple_choice",
    "span_selection",
    "sentence_embedding",
)
_NUM_ROWS = {"train": 200, "valid": 60, "test": 40}
_SUBJECTS = ("The reader", "A small model", "The corpus", "Every sample", "The tokenizer", "Nobody")
_VERBS = ("learns from", "is written to", "looks for", "never forgets", "begins with", "returns")
_OBJECTS = (
    *("the documents", "a long sentence", "its neighbours", "the next token", "an empty list"),
    *("café, naïve and Ångström", "日本語の文", "🙂 and 👩‍👩‍👧", "Привет, мир", "e\u0301 and שלום"),
)
# What a reader of documents may stumble over.
_ODD_DOCUMENTS = (
    "",
    "  \n\t",
    "x",
    "[DOC_START] and [DOC_END] and [PAD] are words here",
    "    def indented():\n        return 1\t\n",
    "one\u2028two\u2029three\x0bfour\x1cfive",
    "the same words again and again and again",
    "the same words again and again and again",
    "null \x00 and control \x07 characters",
)


def data_steps() -> list[Step]:
    """Of documents, rows and dataset directories."""
    datasets = {name: partial(_prepare, name=name) for name in _DATASETS}
    return [
        Step("dataset/documents", _write_documents),
        *(
            Step(f"dataset/{name}", run, ("dataset/documents",), goes_on=False)
            for name, run in datasets.items()
        ),
        Step("dataset/verified", _verify, ("dataset/main",), goes_on=True),
        Step("collected/documents", _collect_documents),
        *(Step(f"collected/{task}", partial(_collect_rows, task=task)) for task in ROW_TASKS),
    ]


def _text(draw: random.Random, number: int) -> str:
    sentences = [
        f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.choice(_OBJECTS)} {number}."
        for _ in range(60 if number % 50 == 7 else 1 + number % 5)
    ]
    return "\n".join(sentences) if number % 3 else " ".join(sentences)


def _texts(name: str, number: int) -> list[str]:
    draw = random.Random(name)
    texts = [_text(draw, number) for number in range(number)]
    for place, odd in enumerate(_ODD_DOCUMENTS):
        texts.insert(11 * place, odd)
    return texts


def _write_documents(work: Path) -> Facts:
    directory = work / "documents"
    directory.mkdir()

    def delimited(texts: list[str], line: str, end: str = "\n") -> bytes:
        return "".join(f"{text}{end}{line}{end}" for text in texts).encode()

    _write_bytes(directory / "train.txt", delimited(_texts("train", 300), "[END_OF_DOCUMENT]"))
    _write_bytes(directory / "valid.txt", delimited(_texts("valid", 60), "[END_OF_DOCUMENT]"))
    windows = delimited(_texts("windows", 40), "  <<END>> ", "\r\n")
    # The last document has no end, and a byte is no UTF-8.
    _write_bytes(directory / "odd.txt", windows + b"broken \xff byte of a document without end")
    rows = [{"number": 1, "body": text} for text in _texts("rows", 80)]
    lines = "".join(json.dumps(row, ensure_ascii=bool(row["number"])) + "\n" for row in rows)
    _write_bytes(directory / "rows.jsonl", lines.encode())
    packed = gzip.compress(lines.encode() + b'{"body": "only in the packed one"}\n', mtime=0)
    _write_bytes(directory / "more.jsonl.gz", packed)
    columns = pyarrow.table(
        {"body": _texts("columns", 30), "other": [1] * (30 + len(_ODD_DOCUMENTS))}
    )
    pyarrow.parquet.write_table(columns, directory / "columns.parquet")
    _write_gpt2_vocabulary(work / "gpt2")
    return {"files": hash_files(directory, "*.txt") | hash_files(directory, "*.jsonl*")}


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write_gpt2_vocabulary(directory: Path) -> None:
    """vocab.json and merges.txt in GPT-2's form: all bytes and a few merges."""
    directory.mkdir()
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    characters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    merges = ["t h", "th e", "Ġ the", "e r", "i n", "Ġ a", "a n", "an d", "Ġ a", "o r"]
    words = [characters[byte] for byte in range(256)]
    words += dict.fromkeys(merge.replace(" ", "") for merge in merges)
    words.append("<|endoftext|>")
    vocabulary = {word: number for number, word in enumerate(words)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = "".join(f"{merge}\n" for merge in dict.fromkeys(merges))
    (directory / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")


_MIXED = (
    *("--documents_train_file", "documents/rows.jsonl"),
    *("--documents_train_file", "documents/more.jsonl.gz"),
    *("--documents_train_file", "documents/columns.parquet"),
    *("--text_field", "body", "--validation_fraction", "0.2", "--deduplicate", "exact"),
    *("--vocab_size", "400", "--max_sample_length", "32", "--min_sample_length", "4"),
)
_PAIR = (
    *("--documents_train_file", "documents/train.txt"),
    *("--documents_valid_file", "documents/valid.txt"),
)
_DATASETS: dict[str, tuple[str, ...]] = {
    "main": (*_PAIR, "--vocab_size", "512", "--max_sample_length", "128", "--num_workers", "1"),
    "mixed_by_one": (*_MIXED, "--num_workers", "1"),
    "mixed_by_two": (*_MIXED, "--num_workers", "2"),
    "slow_encoder": (*_MIXED, "--num_workers", "2", "--tokenizer_backend", "tokenizers"),
    "odd": (
        *("--documents_train_file", "documents/odd.txt", "--validation_fraction", "0.3"),
        *("--end_of_document", "<<END>>", "--no_strip_lines", "--encoding_errors", "replace"),
        *("--vocab_size", "300", "--max_sample_length", "64"),
    ),
    "gpt2_class": (
        *(*_PAIR, "--tokenizer_cls_name", "GPT2Tokenizer", "--tokenizer_path", "gpt2"),
        *("--max_sample_length", "64"),
    ),
}


def _prepare(work: Path, name: str) -> Facts:
    words = ("--datasets_root", "datasets", "--dataset_name", name)
    printed = fst(work, "prepare_dataset", *words, *_DATASETS[name])
    directory = work / "datasets" / name / "0"
    return {
        "printed": printed,
        "files": hash_files(directory, "*/*"),
        "description": read_json(directory / "description.json"),
    }


def _verify(work: Path) -> Facts:
    return {"printed": fst(work, "verify_dataset", "datasets/main/0")}


def _collect_documents(work: Path) -> Facts:
    printed = fst(work, "collect_documents", "python_docs", "--documents_root", "collected")
    return {"printed": printed, "files": hash_files(work / "collected" / "python_docs", "*")}


def _collect_rows(work: Path, task: str) -> Facts:
    words = ("python_docs", "--documents_root", "collected", "--task", task)
    printed = fst(work, "collect_documents", *words)
    directory = work / "collected" / f"python_docs_{task}"
    chosen = work / "rows" / task
    chosen.mkdir(parents=True)
    first: dict[str, Any] = {}
    for split, number in _NUM_ROWS.items():
        lines = (directory / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        first[split] = sha256("\n".join(lines[:number]))
        lines = _some(lines, number, split)
        (chosen / f"{split}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return {
        "printed": printed,
        "first_rows": first,
        "files": hash_files(directory, "*.jsonl"),
        "description": read_json(directory / "description.json"),
    }


def _some(lines: list[str], number: int, split: str) -> list[str]:
    """Rows drawn from all of them; a small model that learned from no answers would give none."""
    fit = [line for line in lines if split != "train" or '"answers": []' not in line]
    return random.Random(split).sample(fit, number)
