"""Strangers' files are read, or one sentence says what they are and what to do."""

import gzip
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from full_stack_transformer.documents import blocks, json_lines
from full_stack_transformer.documents.blocks import DocumentCounts, ReadingOptions, read_lines
from full_stack_transformer.documents.formats import (
    StreamCopies,
    find_document_files,
    format_of,
)
from full_stack_transformer.errors import DocumentsError

OPTIONS = ReadingOptions(end_of_document="[END]")
TEXT = "one line\n[END]\nanother\n[END]\n"


def read(path: Path, options: ReadingOptions = OPTIONS) -> tuple[list[str], DocumentCounts]:
    """The documents of a file and their counts."""
    texts: list[str] = []
    counts = DocumentCounts()
    document_format = format_of(path, options)
    for block in document_format.blocks(path, start=0, continues=False):
        found = document_format.documents(block)
        texts += found.texts
        counts.add(found.counts)
    return texts, counts


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window_is_read_and_its_memory_named(
    window_log: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    path = tmp_path / "x.txt.zst"
    # Without a known size of the content the window is not made smaller.
    with path.open("wb") as file, compressor.stream_writer(file) as writer:
        writer.write(TEXT.encode())
    with caplog.at_level(logging.INFO):
        assert read(path)[0] == read(path)[0] == ["one line", "another"]
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == (window_log > 27)
    assert all(f"a window of {2 ** (window_log - 20):,} MiB" in message for message in named)


def test_frames_that_are_skipped_and_empty_ones_are_no_end(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"
    half = len(TEXT) // 2
    frames = [skippable, compress(TEXT[:half].encode()), compress(b""), skippable]
    (tmp_path / "x.txt.zst").write_bytes(b"".join([*frames, compress(TEXT[half:].encode())]))
    assert read(tmp_path / "x.txt.zst")[0] == ["one line", "another"]


def test_a_little_of_zstd_never_becomes_much_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(bytes(50_000_000)))
    with path.open("rb") as raw:
        file: Any = blocks._decompressed(path, raw)
        assert file.read(1) == b"\0"
        assert len(file.raw._content) <= 1 << 24


_TYPES = {
    "plain": pyarrow.string(),
    "large": pyarrow.large_string(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "bytes": pyarrow.binary(),
    "large bytes": pyarrow.large_binary(),
    "view": pyarrow.string_view(),
}


@pytest.mark.parametrize("name", _TYPES)
def test_a_column_of_texts_is_read_in_each_of_arrows_forms(name: str, tmp_path: Path) -> None:
    texts = ["one é", None, "", "  ", "one é"]
    column = pyarrow.array(texts)
    if name == "dictionary":
        column = column.dictionary_encode()
    elif name == "view":
        column = pyarrow.array(texts, pyarrow.string_view())
    else:
        column = column.cast(_TYPES[name])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    found, counts = read(tmp_path / "x.parquet")
    assert found == ["one é", "one é"]
    assert counts.num_empty_documents == 3


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.string()], ids=["bytes", "string"])
def test_a_column_that_is_not_utf_8_is_named_or_replaced(
    kind: pyarrow.DataType, tmp_path: Path
) -> None:
    raw = pyarrow.array([b"good", None, b"caf\xe9"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(kind, len(raw), raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(
        DocumentsError, match=r"x\.parquet, row 2 is not UTF-8: byte 0xe9 at offset 3"
    ):
        read(tmp_path / "x.parquet")
    replacing = ReadingOptions(end_of_document="[END]", encoding_errors="replace")
    found, counts = read(tmp_path / "x.parquet", replacing)
    assert (found, counts.num_replaced_characters) == (["good", "caf\ufffd"], 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "empty"),
        ("", "empty"),
        (" \n", "empty"),
        ("a", "text"),
        (1, "error"),
        (["a"], "error"),
    ],
    ids=["null", "nothing", "blank", "text", "number", "list"],
)
def test_both_formats_of_rows_have_the_same_rules(
    value: Any, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": value}) + "\n")
    table = pyarrow.Table.from_pylist([{"text": value}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    for path in (tmp_path / "x.jsonl", tmp_path / "x.parquet"):
        if expected == "error":
            with pytest.raises(DocumentsError, match="text"):
                read(path)
            continue
        _, counts = read(path)
        found = (counts.num_documents, counts.num_empty_documents)
        assert found == ((1, 0) if expected == "text" else (0, 1))


@pytest.mark.parametrize(
    "content",
    [b"a\r[END]\rb\r[END]\r", b"a\r\nb\r[END]\r\nc\r\n[END]\r\n", b"a\n[END]\nb\r[END]"],
    ids=["alone", "mixed", "at the end"],
)
def test_a_delimiter_before_a_lone_carriage_return_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DocumentsError, match=r"carriage return alone \(CR\).*perl -pe"):
        read(tmp_path / "x.txt")


def test_json_lines_with_lone_carriage_returns_or_null_bytes_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    with pytest.raises(DocumentsError, match="lines end with a carriage return alone"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16-le"))
    with pytest.raises(DocumentsError, match="null bytes, as UTF-16 does"):
        read(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (TEXT.encode("utf-16"), "UTF-16"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "UTF-16"),
        (TEXT.encode("utf-32"), "UTF-32"),
        (gzip.compress(TEXT.encode()), "gzip"),
        (zstandard.ZstdCompressor().compress(TEXT.encode()), "zstd"),
        (b"PAR1....PAR1", "Parquet"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\xfd7zXZ\0\0", "xz"),
    ],
    ids=["utf-16", "utf-16-be", "utf-32", "gzip", "zstd", "parquet", "zip", "pdf", "xz"],
)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".txt.gz"])
def test_what_is_no_text_in_utf_8_is_named(
    content: bytes, name: str, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    options = ReadingOptions(end_of_document="[END]", encoding_errors="replace")
    with pytest.raises(DocumentsError, match=rf"x\S+ is {name}.*, expected text in UTF-8; "):
        read(path, options)


def test_a_line_that_is_too_long_is_named_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_WHOLE_BYTES", 5_000_000)
    monkeypatch.setattr(blocks, "MAX_LINE_BYTES", 5_000_000)
    content = b'{"text": "' + b"a" * 30_000_000 + b'"}\n'
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "b"}\n' + content, 1))
    with pytest.raises(
        DocumentsError, match=r"x\.jsonl\.gz: the line at byte 14 has more than 4 MiB"
    ):
        read(path)
    with pytest.raises(DocumentsError, match=r"x\.jsonl\.gz: line 2 has more than 4 MiB"):
        list(read_lines(path))


def _tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TEXT)


def _names(root: Path) -> list[str]:
    found = find_document_files([root], "--flag", StreamCopies())
    return [path.relative_to(root).as_posix() for path in found]


def test_hidden_files_are_passed_over_and_upper_case_endings_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _tree(tmp_path, "a.TXT", "b/c.JsonL", "d.Txt.GZ", ".git/e.txt", "f/.ipynb_checkpoints/g.txt")
    _tree(tmp_path, "f/._h.txt", "README.md")
    with caplog.at_level(logging.INFO):
        assert _names(tmp_path) == ["a.TXT", "b/c.JsonL", "d.Txt.GZ"]
    [record] = caplog.records
    for passed_over in (
        ".git (hidden)",
        ".ipynb_checkpoints (hidden)",
        "._h.txt (hidden)",
        "README.md",
    ):
        assert passed_over in record.getMessage()
    # One that is named itself is read.
    assert _names(tmp_path / ".git") == ["e.txt"]


def test_linked_directories_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _tree(tmp_path, "data/a/1.txt", "data/b/2.txt", "outside/3.txt", "elsewhere/4.txt")
    root = tmp_path / "data"
    (root / "again").symlink_to(root / "a")
    (root / "b" / "loop").symlink_to(root)
    (root / "b" / "up").symlink_to(tmp_path)
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "twice").symlink_to(tmp_path / "outside")
    (root / ".hidden").symlink_to(tmp_path / "elsewhere")
    (root / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    (root / "file.txt").symlink_to(tmp_path / "elsewhere" / "4.txt")
    with caplog.at_level(logging.INFO):
        assert _names(root) == ["a/1.txt", "b/2.txt", "file.txt", "linked/3.txt"]
    assert "passed over" in caplog.text


def test_pipes_are_copied_and_read_by_their_content(tmp_path: Path) -> None:
    contents = {
        "text": TEXT.encode(),
        "rows": b'{"text": "one line"}\n{"text": "another"}\n',
        "packed": gzip.compress(TEXT.encode()),
        "named.txt": TEXT.encode(),
    }
    with StreamCopies() as copies:
        for name, content in contents.items():
            os.mkfifo(tmp_path / name)
            writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,))
            writer.start()
            [path] = find_document_files([tmp_path / name], "--flag", copies)
            writer.join()
            assert read(path)[0] == ["one line", "another"], name
            with pytest.raises(DocumentsError, match="can be read only once"):
                find_document_files([tmp_path / name], "--flag", copies)
    assert not path.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "x does not exist"),
        (
            lambda path: path.symlink_to("nowhere"),
            "x is a link to nowhere, which cannot be followed",
        ),
        (lambda path: path.symlink_to("/dev/zero"), "x is a device"),
        (lambda path: path.symlink_to("x"), "x is a link to x, which cannot be followed"),
    ],
    ids=["missing", "broken link", "device", "loop"],
)
def test_what_is_no_file_is_named(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(DocumentsError, match=message):
        find_document_files([tmp_path / "x"], "--flag", StreamCopies())


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(TEXT.encode() * 50))
    damaged[30] ^= 0xFF
    (tmp_path / "x.txt.gz").write_bytes(damaged)
    with pytest.raises(DocumentsError, match="cannot be read"):
        read(tmp_path / "x.txt.gz")
