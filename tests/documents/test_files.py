"""The same documents come from every format, compressed or not, from files and directories."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from full_stack_transformer.documents import json_lines
from full_stack_transformer.documents.blocks import ReadingOptions
from full_stack_transformer.documents.formats import (
    StreamCopies,
    find_document_files,
    format_of,
)
from full_stack_transformer.errors import DocumentsError

DOCUMENTS = ["first\ndocument", "second é 🙂 \u2028", "  third  ", "x" * 300]
OPTIONS = ReadingOptions(end_of_document="[END]", strip_lines=False)


def _read(path: Path, options: ReadingOptions = OPTIONS) -> list[str]:
    document_format = format_of(path, options)
    blocks = document_format.blocks(path, start=0, continues=False)
    return [text for block in blocks for text in document_format.documents(block).texts]


def _write(path: Path, rows: list[dict[str, str | None]] | None = None) -> Path:
    rows = rows or [{"text": text} for text in DOCUMENTS]
    if ".parquet" in path.name:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if ".jsonl" in path.name:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        content = "".join(f"{row['text']}\n[END]\n" for row in rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content[:100]) + gzip.compress(content[100:])
    if path.suffix == ".zst":
        compress = zstandard.ZstdCompressor().compress
        content = compress(content[:100]) + compress(content[100:])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name",
    ["x.txt", "x.txt.gz", "x.txt.zst", "x.jsonl", "x.jsonl.gz", "x.ndjson.zst", "x.parquet"],
)
def test_every_format_gives_the_same_documents(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / name.replace("ndjson", "jsonl"))
    assert _read(path) == DOCUMENTS
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 7)
    assert _read(path) == DOCUMENTS


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst", "x.jsonl", "x.parquet"])
def test_reading_goes_on_at_any_position(name: str, tmp_path: Path) -> None:
    path = _write(tmp_path / name)
    document_format = format_of(path, OPTIONS)
    [*_, last] = document_format.blocks(path, start=0, continues=False)
    [again, *_] = document_format.blocks(path, start=last.start, continues=last.continues)
    assert again.start == last.start
    assert document_format.documents(again).texts == document_format.documents(last).texts


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.txt", "a.jsonl", "b/1.txt.gz", "c.parquet"):
        _write(tmp_path / name)
    (tmp_path / "README.md").write_text("no documents")
    (tmp_path / ".hidden.txt").write_text("no documents")
    found = find_document_files([tmp_path, tmp_path / "a.jsonl"], "--flag", StreamCopies())
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["a.jsonl", "b/1.txt.gz", "b/2.txt", "c.parquet", "a.jsonl"]


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentsError, match=r"--flag .*none\.txt does not exist"):
        find_document_files([tmp_path / "none.txt"], "--flag", StreamCopies())
    with pytest.raises(DocumentsError, match=r"holds no file ending in \.txt"):
        find_document_files([tmp_path], "--flag", StreamCopies())


def test_the_text_field_is_named_by_an_option(tmp_path: Path) -> None:
    rows: list[dict[str, str | None]] = [{"body": "here", "text": "not this"}, {"body": None}]
    options = ReadingOptions(end_of_document="x", text_field="body")
    assert _read(_write(tmp_path / "x.parquet", rows), options) == ["here"]
    assert _read(_write(tmp_path / "x.jsonl", rows), options) == ["here"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"line at byte 14 .* not valid JSON"),
        ("x.jsonl", b"[1]\n", "found list"),
        ("x.jsonl", b'{"body": 1}\n', r"found the fields 'body'"),
        ("x.jsonl", b'{"text": 1}\n', "int there"),
        ("x.jsonl", b"[" * 100_000, "not valid JSON"),
        ("x.parquet", b"no parquet", "should be a Parquet file"),
        ("x.txt.gz", b"no gzip", "cannot be read"),
        ("x.txt.gz", gzip.compress(b"abc" * 999)[:-9], "cannot be read"),
        ("x.txt.zst", b"no zstandard", "cannot be read"),
    ],
    ids=["half", "list", "fields", "type", "deep", "parquet", "gzip", "cut gzip", "zst"],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentsError, match=message):
        _read(tmp_path / name)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(DocumentsError, match="should hold strings, found int64"):
        _read(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"other": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DocumentsError, match=r"should have a column 'text' .* found other"):
        _read(tmp_path / "x.parquet")


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n')
    assert _read(tmp_path / "x.jsonl") == ["a?b"]
