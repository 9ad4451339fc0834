"""Preparing strangers' files: streams, folders, giant documents and many small ones."""

import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import DatasetDirectory, open_dataset
from full_stack_transformer.documents import delimited, json_lines
from full_stack_transformer.errors import DatasetError, DocumentsError
from full_stack_transformer.preparation import encoding, journal, report
from full_stack_transformer.preparation.encoding import EncodedBlock, Workers
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from tests.conftest import RunFst

END = "[END_OF_DOCUMENT]"
TEXTS = [
    f"the document with the number {number}, and é 日本。語 more\n of it" for number in range(60)
]


def _delimited(texts: list[str]) -> str:
    return "".join(f"{text}\n{END}\n" for text in texts)


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    path = tmp_path / "valid.txt"
    path.write_text(_delimited(TEXTS[:5]), encoding="utf-8")
    return path


def _prepared(train: Path, root: Path, dataset: DatasetDirectory | None, **options: Any) -> Path:
    """The directory; with the tokenizer of `dataset`, or one that is trained."""
    tokenizer = str(dataset.tokenizer_directory) if dataset else None
    given: dict[str, Any] = {
        "documents_train_file": (train,),
        "documents_valid_file": (root / "valid.txt",),
        "datasets_root": root / "datasets",
        "dataset_name": "strange",
        "tokenizer_path": tokenizer,
        "vocab_size": 300,
        "max_sample_length": 32,
        "min_sample_length": 4,
        "strip_lines": False,
        **options,
    }
    return prepare_dataset(PrepareDatasetArguments(**given))


def _corpus(directory: Path) -> bytes:
    return (directory / "train/corpus.npy").read_bytes()


def _run_bytes(words: list[bytes], stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    command = [os.fsencode(sys.executable), b"-m", b"full_stack_transformer", *words]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


def test_standard_input_and_names_that_are_not_utf_8(
    dataset: DatasetDirectory, tmp_path: Path, valid: Path
) -> None:
    """Rows on a pipe, into a directory whose name is Latin-1; the path is printed as it is."""
    root = os.fsencode(tmp_path)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(rows)
    for name, stdin in ((b"-", rows), (b"/dev/stdin", rows), (root + b"/caf\xe9.jsonl", b"")):
        done = _run_bytes(
            [
                *(b"prepare_dataset", b"--documents_train_file", name),
                *(b"--documents_valid_file", os.fsencode(valid)),
                *(b"--tokenizer_path", os.fsencode(dataset.tokenizer_directory)),
                *(b"--datasets_root", root + b"/out\xe9", b"--dataset_name", b"strange"),
            ],
            stdin,
        )
        assert done.returncode == 0, done.stderr
        directory = Path(os.fsdecode(done.stdout.removesuffix(b"\n")))
        opened = open_dataset(directory)
        assert opened.description["counts"]["train"]["num_documents"] == len(TEXTS)
        [described] = opened.description["input_files"]["train"]
        expected = "caf\\xe9.jsonl" if b"caf" in name else "standard_input.jsonl"
        assert described["name"] == expected
    assert directory.name == "2"


def test_a_file_behind_standard_input_is_read_where_it_is(
    dataset: DatasetDirectory, tmp_path: Path, valid: Path
) -> None:
    command = [
        *(sys.executable, "-m", "full_stack_transformer", "prepare_dataset"),
        *("--documents_train_file", "-", "--documents_valid_file", str(valid)),
        *("--tokenizer_path", str(dataset.tokenizer_directory)),
        *("--datasets_root", str(tmp_path / "out"), "--dataset_name", "strange"),
    ]
    with valid.open() as file:
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    description = open_dataset(Path(done.stdout.strip())).description
    assert description["input_files"]["train"] == description["input_files"]["valid"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "fst: --documents_train_file - is empty; expected documents"
    )


def test_a_file_without_documents_does_not_end_a_folder(
    dataset: DatasetDirectory, tmp_path: Path, valid: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "1.txt").write_text(_delimited(TEXTS[:30]), encoding="utf-8")
    (folder / "2.txt").write_text("no end")
    (folder / "3.txt").write_text(_delimited(TEXTS[30:]), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        directory = _prepared(folder, tmp_path, dataset)
    assert "train: 1 of 3 files have no documents: " in caplog.text
    assert (
        open_dataset(directory).description["counts"]["train"]["num_files_without_documents"] == 1
    )
    (tmp_path / "all.txt").write_text(_delimited(TEXTS), encoding="utf-8")
    assert _corpus(directory) == _corpus(_prepared(tmp_path / "all.txt", tmp_path, dataset))
    # The one that was named, with its own size, not that of those before.
    with pytest.raises(
        DocumentsError, match=r"2\.txt: no document found in 6 bytes: .*echo '\[END"
    ):
        _prepared(
            folder, tmp_path, dataset, documents_train_file=(folder / "1.txt", folder / "2.txt")
        )
    (folder / "1.txt").unlink()
    (folder / "3.txt").unlink()
    with pytest.raises(DocumentsError, match=r"2\.txt: no document found in 6 bytes"):
        _prepared(folder, tmp_path, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", '{"text": "a"}\n', r"its lines are JSON; rename it so that it ends in \.jsonl"),
        ("x.csv", "text,label\na,b\n", r"\.csv is not read"),
        ("x.txt", "a\0b\0", "null bytes"),
        ("x.txt", " \n", "it is empty"),
        ("x.txt", "a\rb\r", "carriage return alone"),
        ("x.jsonl", '{"text": null}\n', "all texts under 'text' .* are empty"),
    ],
    ids=["json", "csv", "utf-16", "empty", "carriage returns", "nulls"],
)
def test_why_a_file_has_no_documents_is_said(
    name: str, content: str, message: str, tmp_path: Path, valid: Path
) -> None:
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises(DocumentsError, match=message):
        _prepared(tmp_path / name, tmp_path, None)


def test_one_long_document_cannot_be_divided_for_validation(
    tmp_path: Path, dataset: DatasetDirectory
) -> None:
    (tmp_path / "book.txt").write_text(_delimited(["\n".join(TEXTS)]), encoding="utf-8")
    with pytest.raises(
        DatasetError, match=r"takes whole documents, and there is 1 .*divide the text"
    ):
        _prepared(
            tmp_path / "book.txt",
            tmp_path,
            dataset,
            documents_valid_file=(),
            validation_fraction=0.1,
        )


def test_bytes_a_token_are_those_of_the_texts(
    dataset: DatasetDirectory, tmp_path: Path, valid: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": text, "other": "x" * 5000} for text in TEXTS]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.INFO):
        directory = _prepared(tmp_path / "x.jsonl", tmp_path, dataset)
    counts = open_dataset(directory).description["counts"]
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert counts["train"]["num_text_bytes"] == num_bytes
    num_tokens = sum(split["num_tokens"] + split["num_dropped_tokens"] for split in counts.values())
    num_bytes += counts["valid"]["num_text_bytes"]
    assert f" {num_bytes / num_tokens:.2f} bytes a token" in caplog.text


def test_the_description_says_how_documents_are_framed(dataset: DatasetDirectory) -> None:
    assert dataset.description["document_framing"] == {
        "begin": "[DOC_START]",
        "text_before": "",
        "text_after": "",
        "end": "[DOC_END]",
    }


def test_giant_rows_are_encoded_in_pieces_with_the_same_ids(tmp_path: Path, valid: Path) -> None:
    """Also the tokenizer that is trained on pieces is the same."""
    giant = " ".join(TEXTS * 20)
    rows = [TEXTS[0], giant, TEXTS[1], "w" * 5000 + " " + giant, TEXTS[2]]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    whole = _prepared(path, tmp_path, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BLOCK_BYTES", 700)
        patch.setattr(json_lines, "BLOCK_BYTES", 700)
        patch.setattr(encoding, "_MAX_PENDING_BYTES", 900)
        in_pieces = _prepared(path, tmp_path, None)
    for name in (
        "train/corpus.npy",
        "train/sample_start_positions.npy",
        "tokenizer/tokenizer.json",
    ):
        assert (whole / name).read_bytes() == (in_pieces / name).read_bytes()


def test_small_files_share_a_call_and_an_interrupted_run_continues_between_them(
    dataset: DatasetDirectory, tmp_path: Path, valid: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        content = _delimited([text]) if number % 7 else "no end"
        (folder / f"{number:02}.txt").write_text(content, encoding="utf-8")
    sizes: list[int] = []
    original = Workers.encode

    def counting(*arguments: Any) -> Generator[EncodedBlock, None, None]:
        for number, encoded in enumerate(original(*arguments)):
            sizes.append(len(encoded.ended_files))
            if number == stop_at:
                raise KeyboardInterrupt
            yield encoded

    stop_at = -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "encode", counting)
        whole = _prepared(folder, tmp_path, dataset)
        assert max(sizes) == len(TEXTS)
        patch.setattr(encoding, "BLOCK_BYTES", 400)
        patch.setattr(journal, "_SECONDS_BETWEEN_LINES", 0.0)
        stop_at = 4
        with pytest.raises(KeyboardInterrupt):
            _prepared(folder, tmp_path, dataset)
        stop_at = -1
        sizes.clear()
        resumed = _prepared(folder, tmp_path, dataset, resume=True)
    assert 0 < sum(sizes) < len(TEXTS) + 1
    assert _corpus(whole) == _corpus(resumed)
    counts = [open_dataset(one).description["counts"] for one in (whole, resumed)]
    assert counts[0] == counts[1]
    assert counts[0]["train"]["num_files_without_documents"] == 9


def test_off_a_terminal_progress_is_logged(
    dataset: DatasetDirectory,
    tmp_path: Path,
    valid: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert report._SECONDS_BETWEEN_LINES[0] < 10
    monkeypatch.setattr(report, "_SECONDS_BETWEEN_LINES", (0.001, 0.002))
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 400)
    with caplog.at_level(logging.INFO):
        _prepared(valid, tmp_path, dataset)
    lines = [
        record.getMessage() for record in caplog.records if ", after 0 s" in record.getMessage()
    ]
    assert any(line.startswith("encoding train: file 1 of 1, ") for line in lines) or any(
        line.startswith("hashing files: file ") for line in lines
    )


def test_a_giant_line_without_an_end_is_one_sentence(
    tmp_path: Path, run_fst: RunFst, valid: Path
) -> None:
    block = b"a" * (1 << 20)
    with gzip.open(tmp_path / "x.jsonl.gz", "wb", 1) as file:
        file.write(b'{"text": "')
        for _ in range(300):
            file.write(block)
    done = run_fst(
        *("prepare_dataset", "--documents_train_file", tmp_path / "x.jsonl.gz"),
        *("--documents_valid_file", valid, "--dataset_name", "x", "--datasets_root", tmp_path),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"fst: {tmp_path / 'x.jsonl.gz'}: the line at byte 0 has more than 256 MiB, and is read as a whole"
    )
    assert "Traceback" not in done.stderr
