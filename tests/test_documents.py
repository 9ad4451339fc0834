"""Documents are what stands before a delimiter line, whatever the lines look like."""

import logging
from pathlib import Path

import pytest

from full_stack_transformer.documents import DocumentReader
from full_stack_transformer.errors import DocumentsError


def _read(path: Path, content: bytes, *, strip_lines: bool = True) -> list[str]:
    path.write_bytes(content)
    return list(DocumentReader(path, end_of_document="[END]", strip_lines=strip_lines))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n[END]\nc\n[END]\n", ["a\nb", "c"]),
        (b"a\r\nb\r\n[END]\r\n", ["a\nb"]),
        (b"\xef\xbb\xbfa\n[END]", ["a"]),
        (b"  a  \n\t[END]  \n", ["a"]),
        (b"[END]\n\n[END]\n \n[END]\na\n[END]\n", ["a"]),
        (b"a [END] b\n[END]\n", ["a [END] b"]),
        ("a\u2028b\x0bc\x85d\n[END]\n".encode(), ["a\u2028b\x0bc\x85d"]),
        (b"a\n\n\nb\n[END]\n", ["a\n\n\nb"]),
        (b"a\rb\n[END]\n", ["a\rb"]),
    ],
    ids=["two", "crlf", "bom", "spaces", "empty", "inside", "other breaks", "blank lines", "cr"],
)
def test_documents_end_at_delimiter_lines(
    content: bytes, expected: list[str], tmp_path: Path
) -> None:
    assert _read(tmp_path / "x.txt", content) == expected


def test_indentation_stays_on_request(tmp_path: Path) -> None:
    content = b"def f():\n    return 1  \r\n [END] \n"
    assert _read(tmp_path / "x.txt", content, strip_lines=False) == ["def f():\n    return 1  "]
    assert _read(tmp_path / "x.txt", content) == ["def f():\nreturn 1"]


def test_an_unterminated_document_is_dropped_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert _read(tmp_path / "x.txt", b"a\n[END]\nb\n") == ["a"]
    assert "no [END] line after it (line 3)" in caplog.text


def test_what_was_read_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\n[END]\n\n[END]\nb\n[END]\n")
    reader = DocumentReader(path, end_of_document="[END]")
    assert len(list(reader)) == 2
    assert (reader.counts.num_documents, reader.counts.num_empty_documents) == (2, 1)
    assert reader.counts.num_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n", r"found no such line in 2 lines"),
        (b"", r"found no such line in 0 lines"),
        (b"a\nb\xffc\n[END]\n", r"line 2 is not UTF-8 \(byte 0xff at offset 3\)"),
        (b"\xef\xbb\xbfab\xe9\n[END]\n", r"line 1 is not UTF-8 \(byte 0xe9 at offset 5\)"),
    ],
    ids=["no delimiter", "empty file", "not utf-8", "not utf-8 after bom"],
)
def test_bad_files_are_named_with_the_place(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DocumentsError, match=message):
        _read(tmp_path / "x.txt", content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentsError, match=r"none\.txt.*No such file"):
        list(DocumentReader(tmp_path / "none.txt", end_of_document="x"))
