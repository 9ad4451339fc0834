"""Parts of files give the documents of the whole file, wherever they are cut."""

import gzip
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from full_stack_transformer.documents import delimited, json_lines
from full_stack_transformer.documents.blocks import Block, DocumentCounts, ReadingOptions
from full_stack_transformer.documents.formats import format_of
from full_stack_transformer.documents.parts import blocks_of, parts_of
from full_stack_transformer.errors import DocumentsError

_DELIMITER = "[E]"
_TINY_BLOCK = 48
# What makes cuts difficult: delimiters that are none, white space around them, long lines and words, returns
# before line feeds, blank documents, characters of several bytes, and bytes that are no characters.
_LINES = st.one_of(
    st.sampled_from(
        [
            *("[E]", " [E]\t", "[E]\r", "[E] x", "x[E]", "", " ", "\u3000[E]", "[E]" + " " * 40),
            *(" " * 40 + "[E]", "a b", "word " * 9, "x" * 70, "é\u3000🙂" * 7, "\ufeff[E]"),
        ]
    ).map(str.encode),
    st.binary(max_size=6).map(lambda content: content.replace(b"\n", b"").replace(b"\r", b"")),
)
_FILES = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf"]), st.lists(_LINES, max_size=40), st.booleans()
).map(lambda parts: parts[0] + b"\n".join(parts[1]) + b"\n" * parts[2])
_OPTIONS = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", _TINY_BLOCK)
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", _TINY_BLOCK)
    monkeypatch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 24)


def _content(blocks: list[Block], options: ReadingOptions) -> object:
    """The documents with the pieces that they arrive in, and all counts; or the error."""
    total = DocumentCounts()
    pieces: list[tuple[str, bool, bool]] = []
    for block in blocks:
        try:
            found = format_of(block.path, options).documents(block)
        except DocumentsError as error:
            return str(error).partition(":")[0]
        total.add(found.counts)
        for number, text in enumerate(found.texts):
            is_head = found.has_head and number == 0
            is_tail = found.has_tail and number == len(found.texts) - 1
            pieces.append((text, is_head, is_tail))
    return pieces, total


def _check(path: Path, options: ReadingOptions, num_bytes: int, start: int = 0) -> None:
    """Parts from `start` on, where a block of the whole file begins, against the reader of the whole."""
    whole = list(format_of(path, options).blocks(path, start=0, continues=False))
    first = next((number for number, block in enumerate(whole) if block.start >= start), 0)
    rest = whole[first:]
    parts = parts_of(
        path,
        options,
        start=rest[0].start if first else 0,
        continues=rest[0].continues,
        num_bytes=num_bytes,
    )
    blocks = [block for part in parts for block in blocks_of(part, options)]
    assert [block.is_last for block in blocks] == [False] * (len(blocks) - 1) + [True]
    for before, after in pairwise(blocks):
        assert before.end == after.start
        assert before.unfinished == after.continues
    assert blocks[-1].end == whole[-1].end
    assert _content(blocks, options) == _content(rest, options)


@given(
    content=_FILES,
    num_bytes=st.integers(1, 120),
    start=st.integers(0, 400),
    can_cut=st.booleans(),
    strip=st.booleans(),
)
@_OPTIONS
def test_delimited_text(
    tmp_path: Path, content: bytes, num_bytes: int, start: int, can_cut: bool, strip: bool
) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    options = ReadingOptions(
        end_of_document=_DELIMITER, can_cut=can_cut, strip_lines=strip, encoding_errors="replace"
    )
    _check(path, options, num_bytes, start)


@given(
    lines=st.lists(
        st.sampled_from(
            [
                *('{"text": "a"}', '{"text": ""}', "", " ", '{"text": null}\r', "\ufeff"),
                *('{"text": "' + "é" * 60 + '"}', '{"text": "\\n"}'),
            ]
        ),
        max_size=30,
    ),
    ends=st.booleans(),
    num_bytes=st.integers(1, 120),
    start=st.integers(0, 400),
)
@_OPTIONS
def test_json_lines(
    tmp_path: Path, lines: list[str], ends: bool, num_bytes: int, start: int
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines) + "\n" * ends, encoding="utf-8")
    _check(path, ReadingOptions(end_of_document=_DELIMITER), num_bytes, start)


@pytest.mark.parametrize("num_bytes", [1, 200, 1000, 1 << 20])
@pytest.mark.parametrize("num_rows", [0, 1, 53])
def test_parquet(
    tmp_path: Path, num_rows: int, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("full_stack_transformer.documents.parquet.BLOCK_BYTES", 40)
    path = tmp_path / "x.parquet"
    texts = [None if row % 7 == 3 else f"text {row} " * (row % 5) for row in range(num_rows)]
    parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=4)
    options = ReadingOptions(end_of_document=_DELIMITER)
    num_parts = len(list(parts_of(path, options, start=0, continues=False, num_bytes=num_bytes)))
    assert num_parts == 14 if (num_rows, num_bytes) == (53, 1) else num_parts >= 1
    for start in (0, 1, 7, 30):
        _check(path, options, num_bytes, start)


def test_a_compressed_file_is_one_part(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"a\n[E]\n" * 50))
    options = ReadingOptions(end_of_document=_DELIMITER)
    assert len(list(parts_of(path, options, start=0, continues=False, num_bytes=10))) == 1
    _check(path, options, 10)


def test_a_part_inside_a_large_document_is_empty_and_reads_little(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a b\n[E]\n" + b"word " * 400 + b"\n[E]\nc\n[E]\n")
    options = ReadingOptions(end_of_document=_DELIMITER, can_cut=True)
    parts = list(parts_of(path, options, start=0, continues=False, num_bytes=200))
    counts = [len(list(blocks_of(part, options))) for part in parts]
    assert counts[0] > 30
    assert not any(counts[1:-1])
    _check(path, options, 200)
