"""The command's contract: the format of the two files, both or none, and errors in one sentence."""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from full_stack_transformer.arguments.data import CollectDocumentsArguments
from full_stack_transformer.document_sources import collect
from full_stack_transformer.document_sources.documents import Document
from full_stack_transformer.errors import FullStackTransformerError, MachineError, UsageError


def _collect_these(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    texts: dict[str, bool],
    end_of_document: str = "[END]",
) -> Path:
    documents = [Document(text, "a test", to_validation) for text, to_validation in texts.items()]
    monkeypatch.setitem(collect._SOURCES, "python_docs", lambda: documents)
    arguments = CollectDocumentsArguments(
        "python_docs", documents_root=root, end_of_document=end_of_document
    )
    return collect.main(arguments)


def test_each_document_ends_with_the_delimiter_in_the_file_of_its_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"first\n\nline": False, "second": True, "third ü": False}
    directory = _collect_these(monkeypatch, tmp_path / "deep" / "root", texts)
    assert directory == tmp_path / "deep" / "root" / "python_docs"
    assert (directory / "train.txt").read_text("utf-8") == "first\n\nline\n[END]\nthird ü\n[END]\n"
    assert (directory / "valid.txt").read_text("utf-8") == "second\n[END]\n"
    assert sorted(path.name for path in directory.iterdir()) == ["train.txt", "valid.txt"]


@pytest.mark.parametrize(
    "text",
    ["one\n[END]\ntwo", "one\n  [END]\t\ntwo", "one\r[END]\r\ntwo", "one\u2028[END]\x0ctwo"],
    ids=["plain", "padded", "carriage-returns", "other-line-ends"],
)
def test_a_line_that_equals_the_delimiter_is_dropped_and_counted(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    directory = _collect_these(monkeypatch, tmp_path, {text: False, "[END]\n \n": False})
    assert (directory / "train.txt").read_text("utf-8") == "one\ntwo\n[END]\n"
    assert "collected 1 train and 0 validation documents" in caplog.text
    assert "dropped 2 lines that equal the delimiter" in caplog.text


@pytest.mark.parametrize("end_of_document", ["", "  ", "a\nb"], ids=["empty", "blank", "two-lines"])
def test_a_delimiter_that_cannot_be_a_line_is_refused(
    end_of_document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--end_of_document must be a single line"):
        _collect_these(monkeypatch, tmp_path, {"a": False}, end_of_document)


def test_a_source_that_fails_half_way_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _collect_these(monkeypatch, tmp_path, {"old": False, "older": True})

    def failing() -> Iterator[Document]:
        yield Document("new", "a test", is_for_validation=False)
        raise MachineError("no network")

    monkeypatch.setitem(collect._SOURCES, "python_docs", failing)
    with pytest.raises(MachineError, match="no network"):
        collect.main(CollectDocumentsArguments("python_docs", documents_root=tmp_path))
    assert (directory / "train.txt").read_text("utf-8") == "old\n[END]\n"
    assert (directory / "valid.txt").read_text("utf-8") == "older\n[END]\n"


def test_a_root_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "file"
    root.write_text("I am no directory")
    with pytest.raises(MachineError, match=re.escape(str(root))) as caught:
        _collect_these(monkeypatch, root, {"a": False})
    assert isinstance(caught.value, FullStackTransformerError)


def test_an_unknown_source_is_answered_with_the_known_ones() -> None:
    command = [sys.executable, "-m", "full_stack_transformer", "collect_documents", "pyton_docs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "python_docs" in done.stderr
    assert "nietzsche" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_source_of_the_option_is_there() -> None:
    literal = CollectDocumentsArguments.__annotations__["source"]
    assert set(collect._SOURCES) == set(literal.__args__)
