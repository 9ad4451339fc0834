"""Labelled rows out of every kind of file, and under every known name."""

import gzip
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from full_stack_transformer.errors import RowError
from full_stack_transformer.rows.fields import PLACE, Row, named_rows
from full_stack_transformer.rows.files import read_rows
from full_stack_transformer.rows.splits import (
    describe_rows,
    find_splits,
    num_repeated,
    split_by_hash,
)
from full_stack_transformer.tasks.opening import row_task_class

_ROWS = [{"text": 'a, "b"\nc', "label": "x"}, {"text": "日本", "label": "y"}]


def _bare(rows: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != PLACE} for row in rows]


def _named(rows: Iterable[Row], task: str) -> list[Row]:
    return named_rows(rows, row_task_class(task).named)


def _write(path: Path) -> Path:
    """The two rows, in the format that the name says."""
    name = path.name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(_ROWS), path)
    elif name.endswith(".csv"):
        path.write_text('\ufefftext,label\n"a, ""b""\nc",x\n日本,y\n', encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(_ROWS))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in _ROWS) + "\n"
        content = lines.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet"])
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = list(read_rows(_write(tmp_path / name)))
    assert _bare(rows) == _ROWS
    assert all(name in row[PLACE] for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        (
            "atec_nlp_sim_train.csv",
            "\ufeff1\t\u600e\u4e48, \u66f4\u6539\t\u624b\u673a\t1\n2\ta\tb\t0\n",
            {"text": "\u600e\u4e48, \u66f4\u6539", "text_pair": "\u624b\u673a", "label": "1"},
        ),
        ("train.tsv", 'gj04\t0\t*\tThe "cat sat.\n', {"text": 'The "cat sat.', "label": "0"}),
    ],
    ids=["atec", "cola"],
)
def test_published_tables_without_names_of_columns_are_known(
    name: str, content: str, row: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    [first, *_] = _named(read_rows(path), "sequence_classification")
    assert PLACE in first
    assert {key: first[key] for key in row} == row


def test_a_table_with_tabs_leaves_quotation_marks_alone(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text('sentence\tlabel\nthe "best\t1\n')
    assert _bare(read_rows(path)) == [{"sentence": 'the "best', "label": "1"}]


def test_folders_are_labels(tmp_path: Path) -> None:
    for label in ("pos", "neg", "unsup"):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / "0.txt").write_text(f"a {label} review")
    rows = _bare(read_rows(find_splits(tmp_path)["train"]))
    assert rows == [
        {"text": "a neg review", "label": "neg"},
        {"text": "a pos review", "label": "pos"},
    ]


def test_words_and_labels_are_read_as_conll_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    path.write_text("-DOCSTART- -X- O\n\nGuido NNP B-PER\nsleeps VBZ O\n\n\nParis NNP B-LOC\n")
    rows = list(read_rows(path))
    assert _bare(rows) == [
        {"words": ["Guido", "sleeps"], "labels": ["B-PER", "O"]},
        {"words": ["Paris"], "labels": ["B-LOC"]},
    ]
    assert rows[1][PLACE].endswith("line 7")


def test_words_between_tabs_may_hold_spaces(tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    path.write_text("New York\tB-LOC\r\nsleeps\tO\r\n\t\r\nParis\tB-LOC\r\n")
    assert _bare(read_rows(path)) == [
        {"words": ["New York", "sleeps"], "labels": ["B-LOC", "O"]},
        {"words": ["Paris"], "labels": ["B-LOC"]},
    ]


def test_squad_is_read_nested_and_flat(tmp_path: Path) -> None:
    answer = {"text": "b", "answer_start": 2}
    question = {"id": "1", "question": "q", "answers": [answer]}
    nested = {"data": [{"paragraphs": [{"context": "a b", "qas": [question]}]}]}
    (tmp_path / "x.json").write_text(json.dumps(nested))
    flat = {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}
    expected = [{"text": "b", "start": 2}]
    for rows in (read_rows(tmp_path / "x.json"), [flat]):
        [row] = _named(rows, "span_selection")
        assert (row["question"], row["context"], row["answers"]) == ("q", "a b", expected)


_PAIR = {"text": "a", "text_pair": "b"}
_CHOICES = {"text": "q", "choices": ["x", "y"]}
_STEM = {"stem": "q", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}
_COLUMNS = {"label": ["A", "B"], "text": ["x", "y"]}


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("sequence_classification", {"sentence": "s", "label": 1}, {"text": "s", "label": 1}),
        ("sequence_classification", {"sentence1": "a", "sentence2": "b"}, _PAIR),
        ("sequence_classification", {"question": "a", "sentence": "b"}, _PAIR),
        ("sequence_classification", {"premise": "a", "hypothesis": "b", "label": -1}, _PAIR),
        (
            "sequence_classification",
            {"question1": "a", "question2": "b", "is_duplicate": "1"},
            {**_PAIR, "label": "1"},
        ),
        (
            "sequence_classification",
            {"Quality": "0", "#1 String": "a", "#2 String": "b"},
            {**_PAIR, "label": "0"},
        ),
        (
            "sequence_classification",
            {"sentence1": "a", "sentence2": "b", "gold_label": "neutral"},
            {**_PAIR, "label": "neutral"},
        ),
        ("sequence_classification", {**_PAIR, "label": math.nan}, _PAIR),
        ("sentence_embedding", {"s1": "a", "s2": "b", "score": 4.5}, {**_PAIR, "label": 4.5}),
        ("masked_lm", {"title": "T", "text": "wiki"}, {"title": "T", "text": "wiki"}),
        (
            "multiple_choice",
            {"sent1": "q", "sent2": "She", "ending0": "x", "ending1": "y", "label": "1"},
            {"text": "q", "choices": ["She x", "She y"], "label": 1},
        ),
        (
            "multiple_choice",
            {"startphrase": "q", "sent2": "", "ending0": "x", "ending1": "y", "gold": 0},
            {**_CHOICES, "label": 0},
        ),
        (
            "multiple_choice",
            {"ending0": "x", "ending1": "y", "label": math.nan},
            {**_CHOICES, "text": ""},
        ),
        ("multiple_choice", {"question": _STEM, "answerKey": "B"}, {**_CHOICES, "label": 1}),
        (
            "multiple_choice",
            {"question": "q", "choices": _COLUMNS, "answerKey": "A"},
            {**_CHOICES, "label": 0},
        ),
        (
            "multiple_choice",  # a table has a column for the row with the most choices
            {"sent1": "q", "ending0": "x", "ending1": "y", "ending2": None, "label": 0},
            {**_CHOICES, "label": 0},
        ),
        ("token_labelling", {"tokens": ["a"], "ner_tags": [3]}, {"words": ["a"], "labels": ["3"]}),
    ],
)
def test_the_names_of_known_data_sets(
    task: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert _named([row], task) == [expected]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("span_selection", {"answers": ["b"]}, "string indices must be"),
        ("span_selection", {"answers": {"answer_start": [2]}}, "'text' is missing"),
        ("span_selection", {"answers": {"text": ["b"], "answer_start": []}}, "is shorter"),
        ("multiple_choice", {"ending0": "x", "ending1": "y", "label": "B"}, "literal for int"),
        ("multiple_choice", {"question": "q", "choices": {"label": ["A"]}}, "'text' is missing"),
        (
            "token_labelling",
            {"words": "two words", "labels": "O O"},
            "'two words' should be a list",
        ),
        ("token_labelling", {"words": ["a"], "labels": [None]}, "a label is null"),
    ],
)
def test_fields_of_another_form_are_refused(task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=f"line 3 has fields of another form.*{message}"):
        _named([{**row, PLACE: "x.jsonl, line 3"}], task)


def test_a_lone_surrogate_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(r'{"text": "a \ud83d b", "label": "\ud83d\ude00"}')
    assert _bare(read_rows(path)) == [{"text": "a ? b", "label": "😀"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("x.json", "[" * 100_000, "should be JSON: maximum", id="deep.json"),
        pytest.param("x.jsonl", "\n" + "[" * 100_000, "line 2 should be a JSON", id="deep.jsonl"),
        ("x.jsonl", '{"a": 1}\n[1]\n', "line 2 should be a JSON object, found list"),
        ("x.jsonl", '{"a": 1}\n{"a"\n', "line 2 should be a JSON object, but is not valid JSON"),
        ("x.json", "{}", "should be a list of objects"),
        ("x.csv", "a,b\n1\n", "line 2 should have 2 columns"),
        ("x.csv", "", "is empty"),
        ("x.csv", "text,text,label\n", "two columns have the name 'text'"),
        ("x.conll", "word\n", "line 1 should be a word and its label"),
        ("x.parquet", "no", "should be a Parquet file"),
        ("x.pdf", "no", "should end in one of"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RowError, match=message):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_is_damaged_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl.{kind}"
    content = "".join(f'{{"text": "{n * 7919}"}}\n' for n in range(30_000)).encode()
    compress = gzip.compress if kind == "gz" else zstandard.compress
    whole = compress(content) + compress(content)  # two frames, as `cat` makes them
    path.write_bytes(whole)
    assert len(list(read_rows(path))) == 60_000
    damages = [whole[:-3], whole[:8], whole[: len(whole) // 2 + 100]]
    if kind == "gz":  # zstd's checksum is optional
        damages.append(whole[:50] + bytes([whole[50] ^ 0xFF]) + whole[51:])
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(RowError, match=path.name):
            list(read_rows(path))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="does not exist"):
        list(read_rows(tmp_path / "none.csv"))
    with pytest.raises(RowError, match=r"a folder of .txt files for each label"):
        list(read_rows(tmp_path))
    with pytest.raises(RowError, match="found nothing"):
        find_splits(tmp_path)
    with pytest.raises(RowError, match="should have a text under one of"):
        _named([{"x": 1}], "sequence_classification")
    with pytest.raises(RowError, match="should have choices under"):
        _named([{"x": 1}], "multiple_choice")


def test_a_split_by_hash_keeps_equal_rows_and_groups_together() -> None:
    rows = [{"text": f"text {n % 200}", "label": n % 2, PLACE: str(n)} for n in range(400)]
    parts = split_by_hash(rows, [0.8, 0.1, 0.1])
    assert [len(part) for part in parts] == [pytest.approx(n, abs=40) for n in (320, 40, 40)]
    assert sum(map(len, parts)) == 400
    texts = [{row["text"] for row in part} for part in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert split_by_hash(rows[:100], [0.8, 0.1, 0.1])[1] == [r for r in parts[1] if r in rows[:100]]
    grouped = [{"text": str(n), "group": str(n % 7)} for n in range(70)]
    for part in split_by_hash(grouped, [0.5, 0.5]):
        assert len(part) % 10 == 0


def test_a_split_by_hash_keeps_rows_together_that_differ_in_numbers_and_labels() -> None:
    rows = [
        {"id": n, "sentence": f"text {n % 20}", "score": n / 7, "gold_label": str(n)}
        for n in range(60)
    ]
    first, second = split_by_hash(rows, [0.5, 0.5])
    assert first
    assert second
    assert not {row["sentence"] for row in first} & {row["sentence"] for row in second}


def test_a_description_changes_with_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.txt").write_text("x")
    before = describe_rows(tmp_path)
    (tmp_path / "a" / "0.txt").write_text("y")
    assert describe_rows(tmp_path) != before


def test_hidden_folders_and_those_of_other_programs_are_no_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, elsewhere = tmp_path / "train", tmp_path / "elsewhere"
    for folder in ("good", ".cache", ".ipynb_checkpoints", "__MACOSX", "empty", "good/inner"):
        (root / folder).mkdir(parents=True)
        (root / folder / "._0.txt").write_bytes(b"\x00\xff")
    elsewhere.mkdir()
    (root / "bad").symlink_to(elsewhere)
    (elsewhere / "B.TXT").write_text("\ufeffa bad one\r\nof two lines")
    (root / ".cache" / "0.txt").write_text("hidden")
    (root / "good" / "0.txt.gz").write_bytes(gzip.compress(b"a good one"))
    (root / "good" / "notes.md").write_text("none")
    assert _bare(read_rows(root)) == [
        {"text": "a bad one\nof two lines", "label": "bad"},
        {"text": "a good one", "label": "good"},
    ]
    assert "passed over 3 files and folders that are no texts ending in .txt" in caplog.text
    before = describe_rows(root)
    (root / ".cache" / "1.txt").write_text("hidden too")
    assert describe_rows(root) == before
    (elsewhere / "B.TXT").write_text("another")
    assert describe_rows(root) != before


def test_splits_are_found_in_any_spelling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("Train.CSV", "DEV.txt", "test.jsonl", "test.tsv", "train.md"):
        (tmp_path / name).touch()
    found = {split: path.name for split, path in find_splits(tmp_path).items()}
    assert found == {"train": "Train.CSV", "valid": "DEV.txt", "test": "test.jsonl"}
    assert "test rows are in test.jsonl, test.tsv; reading the first" in caplog.text
    (tmp_path / "classes" / "good").mkdir(parents=True)
    (tmp_path / "classes" / "good" / "0.txt").touch()
    with pytest.raises(RowError, match="if its folders are labels, pass it as --train_file"):
        find_splits(tmp_path / "classes")


_SAME_TEXTS = {
    "sequence_classification": {"sentence1": "a {n}", "sentence2": "b {n}", "label": "{i}"},
    "sentence_embedding": {"text": "a {n}", "score": "{i}"},
    "token_labelling": {
        "tokens": ["a", "{n}"],
        "ner_tags": ["O", "{i}"],
        "chunk_tags": ["{i}", "O"],
    },
    "multiple_choice": {"sent1": "a {n}", "ending0": "b", "ending1": "c {n}", "fold": "{i}"},
    "span_selection": {"question": "a {n}", "context": "b {n}", "title": "{i}"},
}


@pytest.mark.parametrize("task", _SAME_TEXTS)
def test_rows_of_the_same_texts_stay_together_whatever_else_they_say(task: str) -> None:
    cls = row_task_class(task)
    pattern = json.dumps(_SAME_TEXTS[task])
    rows = [
        {**json.loads(pattern.replace("{n}", str(i % 30)).replace("{i}", str(i))), "review_id": i}
        for i in range(120)
    ]
    first, second = split_by_hash(rows, [0.7, 0.3], texts=cls.texts)
    assert first
    assert second
    keys = [{json.dumps(cls.texts(row)) for row in part} for part in (first, second)]
    assert not keys[0] & keys[1]
    assert len(keys[0]) + len(keys[1]) == 30
    assert num_repeated(first, second, texts=cls.texts) == [0]
    assert num_repeated(rows[:30], rows[30:], texts=cls.texts) == [90]


def test_texts_are_equal_that_differ_in_white_space_and_the_form_of_accents() -> None:
    cls = row_task_class("sequence_classification")
    texts = [f"caf\u00e9 {n}" for n in range(40)]
    others = [text.replace("\u00e9", "e\u0301").replace(" ", "  ") + "\n" for text in texts]
    rows = [{"text": text} for text in (*texts, *others)]
    first, second = split_by_hash(rows, [0.5, 0.5], texts=cls.texts)
    assert len(first) % 2 == len(second) % 2 == 0
    assert num_repeated(first, second, texts=cls.texts) == [0]
    # Of other names in another file too, but not if one differs in a letter.
    known = [{"sentence1": "a", "sentence2": "b"}]
    asked = [{"text": "a", "text_pair": "b "}, {"text": "b", "text_pair": "a"}, {"text": "A b"}]
    assert num_repeated(known, asked, texts=cls.texts) == [1]


@pytest.mark.parametrize(
    "fields", [("text",), ("sentence1", "sentence2"), ("question", "sentence"), ("review",)]
)
def test_splits_of_files_without_other_columns_stay_what_they_were(fields: tuple[str, ...]) -> None:
    rows = [
        {**{field: f"{field} {n}" for field in fields}, "label": n % 2, "id": n} for n in range(50)
    ]

    def old_value(row: Row) -> float:
        key = json.dumps([0, {field: row[field] for field in fields}], sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    texts = row_task_class("sequence_classification").texts
    first, second = split_by_hash(rows, [0.8, 0.2], texts=texts)
    assert first == [row for row in rows if old_value(row) < 0.8]
    assert second == [row for row in rows if old_value(row) >= 0.8]
