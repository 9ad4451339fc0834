"""Tables as they are published: without a header, with other delimiters, with a row that is damaged."""

import logging
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.data import RowFileOptions
from full_stack_transformer.errors import RowError, UsageError
from full_stack_transformer.rows.fields import PLACE, Row, named_rows
from full_stack_transformer.rows.files import read_rows
from full_stack_transformer.tasks.opening import row_task_class

_TEXTS = [f"a story, number {n}" for n in range(8)]


def _read(path: Path, task: str = "sequence_classification", **options: Any) -> list[Row]:
    cls = row_task_class(task)
    rows = read_rows(path, RowFileOptions(**options), cls.columns, has_words=cls.reads_words)
    return named_rows(rows, cls.named)


def _facts(row: Row) -> tuple[Any, ...]:
    return (row["text"], row.get("text_pair"), row.get("label"))


@pytest.mark.parametrize(
    ("name", "header", "line", "first"),
    [
        ("x.csv", "", '"{c}","{t}","body of {n}"', (_TEXTS[0], "body of 0", "0")),
        ("x.csv", "", '"{t}",{c}', (_TEXTS[0], None, "0")),
        ("x.csv", "", '"{t}","other {n}",{s}', (_TEXTS[0], "other 0", "0.0")),
        ("x.csv", "", '{n},"{t}",{w}', (_TEXTS[0], None, "bad")),
        ("x.csv", "", "is it {n}?,{q}", ("is it 0?", None, "statement")),
        ("x.tsv", "", "{t}\tother {n}\t{c}", (_TEXTS[0], "other 0", "0")),
        ("x.txt", "", "{w}\t{t}", (_TEXTS[0], None, "bad")),
        ("x.txt", "", "number {n};{w}", ("number 0", None, "bad")),
        ("x.psv", "text|label", "{t}|{c}", (_TEXTS[0], None, "0")),
        ("x.csv", "text;label", "{t};{c}", (_TEXTS[0], None, "0")),
        ("x.csv", "\ufeff Text\t LABEL", "{t}\t{c}", (_TEXTS[0], None, "0")),
        ("X.CSV", "Sentence1,Sentence2,Score", "a {n},b {n},{s}", ("a 0", "b 0", "0.0")),
        ("x.txt", "", "__label__{w} {t}", (_TEXTS[0], None, "bad")),
        ("x.csv", ",text,label,,", '{n},"{t}",{c},,', (_TEXTS[0], None, "0")),
        (
            "x.tsv",
            "text\tlabel",
            '"{t}\nand ""more"""\t{c}',
            (_TEXTS[0] + '\nand "more"', None, "0"),
        ),
    ],
)
def test_the_columns_of_a_table_are_found(
    name: str, header: str, line: str, first: tuple[Any, ...], tmp_path: Path
) -> None:
    lines = [header] if header else []
    for n, text in enumerate(_TEXTS):
        values = {"c": n % 2, "s": n / 2, "w": ("bad", "good")[n % 2]}
        values["q"] = ("statement", "question")[n % 2]
        lines.append(line.format(n=n, t=text, **values))
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = _read(path)
    assert len(rows) == len(_TEXTS)
    assert _facts(rows[0]) == first
    assert rows[0][PLACE] == f"{path}, line {1 + bool(header)}"


def test_what_was_found_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "x.csv").write_text("".join(f"text {n};{n % 2}\n" for n in range(8)))
    _read(tmp_path / "x.csv")
    assert (
        "x.csv: columns are separated by semicolon; text is 'column 1', label is 'column 2'"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            "Title,Body,Class\na,b,1\n",
            {},
            "found Title, Body, Class; .*--text_column, or pass --no_hea",
        ),
        (
            "1,a b,c d,e f\n2,a b,c e,e f\n" * 4,
            {},
            "is not certain; .*--no_header .*--label_column N",
        ),
        ("".join(f"text {n};0,{n}\n" for n in range(8)), {}, "pass --delimiter comma or semicolon"),
        (
            "text,label\na,0\n",
            {"text_column": ("txt",)},
            r"line 1 has no column 'txt' \(--text_col",
        ),
        ("text,label\na,0\n", {"text_column": ("3",)}, "no column '3'"),
        (
            "text,label\na,0\n",
            {"text_column": ("1", "2", "1")},
            "is given 3 times; this task reads 2",
        ),
        ("text,label\na,0\nb\nc,1\n", {}, "line 3 should have 2 columns .* pass --on_bad_row skip"),
        ('text,label\n"a,b",0\n"b, c,1\n', {}, "line 3: .* pass --on_bad_row skip"),
        (
            'text,label\n"a",0\n"b, c',
            {},
            "line 3: a quotation mark is not closed; .* pass --on_bad_row skip",
        ),
        ("text,label\na,0\n".encode("utf-16"), {}, "is UTF-16, expected text in UTF-8.* iconv"),
    ],
)
def test_a_table_in_doubt_is_refused_with_the_option_to_type(
    content: str | bytes, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RowError, match=message):
        _read(path, **options)


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"text_column": ("Title", "Body"), "label_column": "Class"}, ("t 0", "b, 0", "0")),
        ({"text_column": ("2",), "label_column": "3"}, ("b, 0", None, "0")),
        ({"text_column": ("Body",)}, ("b, 0", None, None)),
        ({"text_column": ("2",), "header": False}, ("Body", None, None)),
    ],
)
def test_columns_are_chosen_by_name_or_number(
    options: dict[str, Any], first: tuple[Any, ...], tmp_path: Path
) -> None:
    path = tmp_path / "x.csv"
    lines = "".join(f't {n},"b, {n}",{n % 2}\n' for n in range(4))
    path.write_text(f"Title,Body,Class\n{lines}")
    assert _facts(_read(path, **options)[0]) == first


def test_a_file_without_ending_is_a_table_if_its_delimiter_is_given(tmp_path: Path) -> None:
    path = tmp_path / "SMSSpamCollection"
    path.write_text("".join(f"{('ham', 'spam')[n % 2]}\t{text}\n" for n, text in enumerate(_TEXTS)))
    with pytest.raises(RowError, match="if it is a table, pass --delimiter"):
        _read(path)
    assert _facts(_read(path, delimiter="tab")[1]) == (_TEXTS[1], None, "spam")


def test_options_of_tables_are_refused_where_there_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match="--delimiter is for tables"):
        _read(path, delimiter=",")
    with pytest.raises(UsageError, match="--header is for tables"):
        _read(path, header=False)
    with pytest.raises(UsageError, match="--delimiter must be one character, or one of tab"):
        RowFileOptions(delimiter="||")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("x.tsv", 'text\tlabel\na\t0\nhow tall\n"\tb\t0\nc\t1\n', ["a", "c"]),
        ("x.csv", 'text,label\n"a, b",0\n"not closed,1\n"c, d",1\n', ["a, b", "c, d"]),
        ("x.txt", "__label__x a\nno label\n__label__y b\n", ["a", "b"]),
        ("x.jsonl", '{"text": "a"}\n{"text"\n[1]\n{"text": "b"}\n', ["a", "b"]),
        ("x.json", '[{"text": "a"}, 3]', ["a"]),
    ],
)
def test_bad_rows_are_skipped_and_counted(
    name: str, content: str, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_text(content)
    assert [row["text"] for row in _read(tmp_path / name, on_bad_row="skip")] == texts
    assert f"{name}: skipped " in caplog.text
    with pytest.raises(RowError, match="pass --on_bad_row skip"):
        _read(tmp_path / name)


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        ("-1 0 1", True),
        ("-1 1", True),
        ("-1.0 0.25 1", True),
        ("-2 -1 0 1 2", True),
        ("-1 0 1 2", False),  # SNLI: annotators did not agree
        ("-1 -1", False),  # GLUE's tests
        ("-1 good bad", False),
        ("-1 2.5 4.5", False),
    ],
)
def test_minus_one_is_a_label_where_the_others_say_so(labels: str, kept: bool) -> None:
    rows = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels.split())]
    found = named_rows(rows, row_task_class("sequence_classification").named)
    assert [row.get("label") for row in found] == [
        label if kept or not label.startswith("-1") else None for label in labels.split()
    ]


def test_a_null_text_is_one_thing_in_every_format(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array(["a", None])
    table = {"text": texts.dictionary_encode(), "label": texts.cast(pyarrow.string_view())}
    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    for name in ("x.parquet", "x.jsonl"):
        with pytest.raises(RowError, match=f"{name}, (row 1|line 2) has no text: 'text' is null"):
            _read(tmp_path / name)
    binary = pyarrow.table(
        {"text": pyarrow.array([b"a"]), "label": pyarrow.array(["x"]).dictionary_encode()}
    )
    parquet.write_table(binary, tmp_path / "y.parquet")
    assert _facts(_read(tmp_path / "y.parquet")[0]) == ("a", None, "x")
