"""Labelled rows from docstrings: what a row says, that no side knows the other, and the files."""

import importlib.util
import json
import random
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.data import CollectDocumentsArguments
from full_stack_transformer.document_sources import python_sources, task_rows
from full_stack_transformer.document_sources.collect import main as collect_documents
from full_stack_transformer.document_sources.python_sources import (
    Docstring,
    SeenTexts,
    docstrings_of,
    library_docstrings,
    sentences,
    source_files,
)
from full_stack_transformer.document_sources.task_rows import TaskRow, side_of
from full_stack_transformer.errors import UsageError
from full_stack_transformer.tasks.catalogue import EXAMPLE_ROWS

# A part of the library that every Python has: some 1,500 docstrings.
CONVERSATIONS = "supervised_fine_tuning"
PACKAGES = ("asyncio", "email", "logging", "unittest", "argparse", "json", "pathlib", "typing")
SOURCE = b'''"""About the module."""
class Reader:
    """Reads lines of a file.

    A second sentence follows here. See read_line for more, e.g. its end.

        read_line(1)

    - a list is no prose at all.
    """
    def read_line(self, limit, *, keep_end=False, **others):
        """Return one line, at most limit characters, or raise EOFError."""
    async def empty(self): ""
if True:
    def late(cls_): "Not a word"
'''


@pytest.fixture(scope="module")
def library() -> list[Docstring]:
    """The docstrings of a part of the library."""
    found = [
        (name, path)
        for name, path in source_files(Path(sysconfig.get_path("stdlib")))
        if name.split(".")[0] in PACKAGES
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_sources, "source_files", lambda _root: found)
        return library_docstrings()


def test_a_docstring_knows_its_place() -> None:
    module, reader, read_line, late = docstrings_of("_pyio.reading", SOURCE)
    assert (module.kind, module.name, module.package) == ("module", "", "io")
    assert (reader.kind, reader.name, reader.outermost) == ("class", "Reader", "Reader")
    assert read_line.kind == "function"
    assert read_line.parameters == ("limit", "keep_end", "others")
    assert (read_line.name, read_line.outermost) == ("Reader.read_line", "Reader")
    assert late.text == "Not a word"
    assert list(docstrings_of("broken", b"def (")) == []


def test_sentences_are_those_of_prose() -> None:
    reader = list(docstrings_of("reading", SOURCE))[1]
    assert sentences(reader.text) == [
        "Reads lines of a file.",
        "A second sentence follows here.",
        "See read_line for more, e.g. its end.",
    ]


def test_a_text_in_other_clothes_is_recognised() -> None:
    seen = SeenTexts()
    assert seen.is_new("Return the name of the directory that holds the file.")
    assert not seen.is_new("return the name of the\n  directory that holds the file")
    assert not seen.is_new("Return the name of the directory that holds the link.")
    assert seen.is_new("Return the size of the file, in bytes, as the system counts it.")
    assert seen.is_new("Close it") and not seen.is_new("close it!")


def test_rows_to_classify_have_ten_packages_and_do_not_name_them(library: list[Docstring]) -> None:
    rows = list(task_rows.package_rows(library))
    labels = {row.fields["label"] for row in rows}
    assert labels <= set(PACKAGES) and len(labels) == len(PACKAGES)
    for row in rows:
        words = set(row.fields["text"].lower().replace("_", " ").split())
        assert not words & labels
    assert any("MODULE" in row.fields["text"] for row in rows)


def test_the_names_of_code_are_labelled() -> None:
    rows = list(task_rows.name_rows(list(docstrings_of("reading", SOURCE))))
    reader, read_line, _ = (list(zip(*row.fields.values(), strict=True)) for row in rows)
    assert reader[:4] == [("class", "O"), ("Reader", "B-CLASS"), ("Reads", "O"), ("lines", "O")]
    assert ("read_line", "B-FUNCTION") in reader
    named = [pair for pair in read_line if pair[1] != "O"]
    assert named == [
        ("read_line", "B-FUNCTION"),
        ("limit", "B-ARGUMENT"),
        ("keep_end", "B-ARGUMENT"),
        ("others", "B-ARGUMENT"),
        ("limit", "B-ARGUMENT"),
        ("EOFError", "B-EXCEPTION"),
    ]


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ("see Reader . read_line .", "O B-FUNCTION I-FUNCTION I-FUNCTION O"),
        ("self . read_line ( )", "B-FUNCTION I-FUNCTION I-FUNCTION O O"),
        ("end . Reader", "B-CLASS I-CLASS I-CLASS"),
        ("a line . Then", "O O O O"),
    ],
)
def test_a_dotted_name_is_one_span(words: str, labels: str) -> None:
    known = {"Reader": "CLASS", "read_line": "FUNCTION"}
    assert task_rows._labels(words.split(), known) == labels.split()


def test_the_choice_is_among_four_different_lines(library: list[Docstring]) -> None:
    rows = list(task_rows.choice_rows(library))
    assert len(rows) > 300
    for row in rows:
        assert len(set(row.fields["choices"])) == 4
        assert row.fields["choices"][row.fields["label"]] not in row.fields["text"]
    positions = Counter(row.fields["label"] for row in rows)
    assert min(positions.values()) > len(rows) / 8


def test_the_sentence_that_tells_what_is_asked_is_the_answer() -> None:
    source = b'''def read(path):
    """Read the whole file. It returns bytes, of which there may be none. The path must exist.

    Some must be closed. If it is None, nothing is read."""
'''
    rows = [row.fields for row in task_rows.span_rows(list(docstrings_of("reading", source)))]
    rows = [row for row in rows if row["context"].startswith("Read the whole file.")]
    told = {row["question"]: row["answers"]["text"] for row in rows if row["answers"]["text"]}
    # Two sentences say what is required, so that is not asked.
    assert told == {
        "What does read return?": ["It returns bytes, of which there may be none."],
        "Under which condition does read do otherwise?": ["If it is None, nothing is read."],
    }


def test_an_answer_stands_where_it_is_said_to_stand(library: list[Docstring]) -> None:
    rows = list(task_rows.span_rows(library))
    num_unanswered = 0
    for row in rows:
        answers, context = row.fields["answers"], row.fields["context"]
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            assert context[start:].startswith(text)
        num_unanswered += not answers["text"]
    assert len(rows) / 12 < num_unanswered < len(rows) / 3
    if importlib.util.find_spec("pydoc_data.topics"):  # some distributions leave it out
        assert any("assignment" in row.fields["question"] for row in rows)


def test_half_of_the_pairs_of_sentences_are_of_one_docstring(library: list[Docstring]) -> None:
    rows = list(task_rows.sentence_rows(library))
    scores = Counter(row.fields["score"] for row in rows)
    assert scores[1.0] == scores[0.0] > 100


@pytest.mark.parametrize("task", [task for task in EXAMPLE_ROWS if task != CONVERSATIONS])
def test_no_row_is_on_two_sides_and_the_order_of_drawing_does_not_matter(
    task: str, library: list[Docstring]
) -> None:
    rows = list(task_rows._MAKERS[EXAMPLE_ROWS[task]](library))
    sides = defaultdict(set)
    for row in rows:
        sides[_text_of(row)].add(row.side)
    assert all(len(found) == 1 for found in sides.values())
    assert {row.side for row in rows} == {"train", "valid", "test"}
    random.seed(1)  # nobody else's randomness counts
    assert list(task_rows._MAKERS[EXAMPLE_ROWS[task]](library)) == rows


def _text_of(row: TaskRow) -> str:
    """What must not be known from another side: a pair's first sentence, a context, else the row."""
    return str(row.fields.get("sentence1") or row.fields.get("context") or json.dumps(row.fields))


def test_about_a_tenth_of_the_groups_falls_to_each_other_side() -> None:
    counts = Counter(side_of(f"module {number}") for number in range(2000))
    assert 150 < counts["test"] < 250 and 150 < counts["valid"] < 250


def _collect(root: Path) -> Path:
    return collect_documents(
        CollectDocumentsArguments("python_docs", documents_root=root, task="sentence_embedding")
    )


def test_the_files_are_complete_and_the_same_again(
    tmp_path: Path, library: list[Docstring], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_rows, "library_docstrings", lambda: library)
    directory = _collect(tmp_path / "one")
    assert directory == tmp_path / "one" / "python_docs_sentence_embedding"
    contents = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert sorted(contents) == ["description.json", "test.jsonl", "train.jsonl", "valid.jsonl"]
    description: dict[str, Any] = json.loads(contents["description.json"])
    for side in ("train", "valid", "test"):
        lines = contents[f"{side}.jsonl"].decode().splitlines()
        assert len(lines) == description["number_of_rows"][side] > 0
        assert list(json.loads(lines[0])) == ["sentence1", "sentence2", "score"]
    again = _collect(tmp_path / "two")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == contents
    assert _collect(tmp_path / "one") == directory  # over the old files


def test_rows_of_other_sources_are_refused() -> None:
    with pytest.raises(UsageError, match="--task works with python_docs only"):
        CollectDocumentsArguments("nietzsche", task="span_selection")
