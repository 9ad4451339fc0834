"""Documents are what stands before a delimiter line, wherever blocks are cut."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from full_stack_transformer.documents import delimited
from full_stack_transformer.documents.blocks import DocumentCounts, ReadingOptions
from full_stack_transformer.documents.delimited import DelimitedText
from full_stack_transformer.errors import DocumentsError

DELIMITER = "[END]"


def _options(*, strip_lines: bool = True, can_cut: bool = False) -> ReadingOptions:
    return ReadingOptions(end_of_document=DELIMITER, strip_lines=strip_lines, can_cut=can_cut)


def read(path: Path, options: ReadingOptions) -> tuple[list[str], DocumentCounts]:
    """All documents of a file, pieces put together again, and the counts."""
    documents: list[str] = []
    counts = DocumentCounts()
    document_format = DelimitedText(options)
    open_text: str | None = None
    for block in document_format.blocks(path, start=0, continues=False):
        found = document_format.documents(block)
        counts.add(found.counts)
        assert found.has_head == (open_text is not None)
        texts = list(found.texts)
        if found.has_head and (found.head_ends or found.has_tail):
            texts[0] = (open_text or "") + texts[0]
        open_text = texts.pop() if found.has_tail else None
        documents += texts
    assert open_text is None
    return documents, counts


def reference(content: bytes, *, strip_lines: bool) -> list[str]:
    """The obvious algorithm, all in memory."""
    documents: list[str] = []
    lines: list[str] = []
    for line in content.removeprefix(b"\xef\xbb\xbf").decode().split("\n"):
        if line.strip() == DELIMITER:
            documents.append("\n".join(lines))
            lines = []
        else:
            lines.append(line.strip() if strip_lines else line.removesuffix("\r"))
    return [document for document in documents if document.strip()]


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
        ("\u3000a\u00a0\n\u2003[END]\u1680\n".encode(), ["a"]),
        (b"a\n\n\nb\n[END]\n", ["a\n\n\nb"]),
        (b"a\rb\n[END]\n", ["a\rb"]),
        (b"a\n[END]\nno end\n", ["a"]),
        (b"", []),
    ],
    ids=[
        "two",
        "crlf",
        "bom",
        "spaces",
        "empty",
        "inside",
        "breaks",
        "wide-spaces",
        "blank",
        "cr",
        "rest",
        "none",
    ],
)
def test_documents_end_at_delimiter_lines(
    content: bytes, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    assert (
        read(tmp_path / "x.txt", _options())[0] == expected == reference(content, strip_lines=True)
    )


def test_indentation_stays_on_request(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"def f():\n    return 1  \r\n [END] \n")
    kept, _ = read(tmp_path / "x.txt", _options(strip_lines=False))
    assert kept == ["def f():\n    return 1  "]


_LINES = st.one_of(
    st.sampled_from(
        ["[END]", " [END]\t", "[END]x", "x[END]", "[EN", "D]", "", "  ", "\r", "a b\r"]
    ),
    st.text(alphabet="ab \t\r\u00e9\u3000\U0001f642", max_size=12),
    st.text(alphabet=st.characters(exclude_characters="\n", codec="utf-8"), max_size=8),
)


@settings(max_examples=400, deadline=None)
@given(
    lines=st.lists(_LINES, max_size=80),
    block_bytes=st.integers(80, 200),
    strip_lines=st.booleans(),
    can_cut=st.booleans(),
    ends_well=st.booleans(),
)
@example(  # cut behind the white space at the end of a line
    lines=[
        *("[END]x", "a\u3000\U0001f642\U0001f642\U0001f642", "aaaa\u3000\u3000\U0001f642"),
        *("aaaaaaaaa\u00e9\u3000\U0001f642", "aaaaa\u00e9\u00e9\U0001f642\u3000", "[END]"),
    ],
    block_bytes=80,
    strip_lines=True,
    can_cut=True,
    ends_well=False,
)
def test_blocks_of_any_size_give_the_documents_of_the_obvious_algorithm(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    block_bytes: int,
    strip_lines: bool,
    can_cut: bool,
    ends_well: bool,
) -> None:
    content = "\n".join([*lines, "[END]\n" if ends_well else ""]).encode()
    path = tmp_path_factory.mktemp("blocks") / "x.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", block_bytes)
        patch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 32)
        documents, counts = read(path, _options(strip_lines=strip_lines, can_cut=can_cut))
    # White space at a cut is known to belong to a document only when more of it arrives: documents of
    # white space alone that are larger than a block stay.
    found = [document for document in documents if document.strip()]
    assert found == reference(content, strip_lines=strip_lines)
    assert counts.num_bytes == len(content.removeprefix(b"\xef\xbb\xbf"))


def test_a_document_of_one_line_is_cut_between_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 100)
    text = " ".join(f"word{number} and é more" for number in range(2000))
    (tmp_path / "x.txt").write_text(f"{text}\n[END]\nsecond\n[END]\n", encoding="utf-8")
    document_format = DelimitedText(_options(can_cut=True))
    blocks = list(document_format.blocks(tmp_path / "x.txt", start=0, continues=False))
    assert max(len(block.content) for block in blocks) <= 2000
    assert not any(block.is_forced for block in blocks)
    assert read(tmp_path / "x.txt", _options(can_cut=True))[0] == [text, "second"]
    for block in blocks:
        if block.unfinished:
            assert isinstance(block.content, bytes)
            assert block.content[-1:].isalpha()


def test_a_word_that_fills_a_block_is_cut_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 100)
    text = "é" * 5000
    (tmp_path / "x.txt").write_text(f"{text}\n[END]\n", encoding="utf-8")
    documents, counts = read(tmp_path / "x.txt", _options(can_cut=True))
    assert documents == [text]
    assert counts.num_forced_cuts > 5


def test_what_was_read_is_counted(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\n[END]\n\n[END]\nb\n[END]\nrest")
    _, counts = read(tmp_path / "x.txt", _options())
    assert (counts.num_documents, counts.num_empty_documents) == (2, 1)
    assert (counts.num_unterminated_documents, counts.num_bytes) == (1, 27)


def test_bytes_that_are_not_utf_8_are_named_or_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 16)
    content = b"first document\n[END]\nsecond \xff one, \xc3\n[END]\n"
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DocumentsError, match=rf"byte 0xff at offset {content.index(0xFF)};"):
        read(tmp_path / "x.txt", _options())
    replacing = ReadingOptions(end_of_document=DELIMITER, encoding_errors="replace")
    documents, counts = read(tmp_path / "x.txt", replacing)
    assert documents == ["first document", "second \ufffd one, \ufffd"]
    assert counts.num_replaced_characters == 2


@pytest.mark.parametrize("start_block", [0, 1, 2, 3])
def test_reading_goes_on_at_any_block(
    start_block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 64)
    monkeypatch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 32)
    text = "\n".join(f"line {number}\n[END]" for number in range(40)) + "\n"
    (tmp_path / "x.txt").write_text(text + "one two three " * 30 + "\n[END]\n")
    document_format = DelimitedText(_options(can_cut=True))
    blocks = list(document_format.blocks(tmp_path / "x.txt", start=0, continues=False))
    for first in (blocks[start_block], blocks[-3]):
        again = document_format.blocks(
            tmp_path / "x.txt", start=first.start, continues=first.continues
        )
        assert list(again) == blocks[blocks.index(first) :]
