"""CoNLL and its relatives: forms that are certain are read, others are refused with the option to type."""

from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.data import RowFileOptions
from full_stack_transformer.errors import RowError
from full_stack_transformer.rows.files import read_rows

_UNIVERSAL = (
    "# newdoc id = one\n# text = She cannot.\n"
    "1\tShe\tshe\tPRON\tPRP\t_\t3\tnsubj\t_\t_\n"
    "2-3\tcannot\t_\t_\t_\t_\t_\t_\t_\t_\n"
    "2\tcan\tcan\tAUX\tMD\t_\t0\troot\t_\t_\n"
    "3\tnot\tnot\tPART\tRB\t_\t2\tadvmod\t_\t_\n"
    "3.1\tstay\tstay\tVERB\tVB\t_\t_\t_\t_\t_\n"
    "4\tNew York\tNew York\tPROPN\tNN\t_\t2\tobj\t_\t_\n\n"
)
_GERMEVAL = (
    "#\tsource 12\t[2011-02-03]\t\n1\tAnna\tB-PER\tO\n2\tGreen\tB-ORG\tB-LOC\n\n"
    "#\tsource 13\t[2011-02-04]\t\n1\tNobody\tO\tO\n"
)


def _read(path: Path, **options: Any) -> list[tuple[list[str], list[str]]]:
    rows = read_rows(path, RowFileOptions(**options), has_words=True)
    return [(row["words"], row["labels"]) for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "options", "first"),
    [
        (
            "x.conllu",
            _UNIVERSAL,
            {},
            "She/PRON can/AUX not/PART New York/PROPN",
        ),
        ("x.conll", _UNIVERSAL, {"label_column": "XPOS"}, "She/PRP can/MD not/RB New York/NN"),
        (
            "x.conllu",
            _UNIVERSAL,
            {"label_column": "8"},
            "She/nsubj can/root not/advmod New York/obj",
        ),
        ("x.tsv", _GERMEVAL, {}, "Anna/B-PER Green/B-ORG"),
        ("x.conll", _GERMEVAL, {"label_column": "4"}, "Anna/O Green/B-LOC"),
        ("x.conll", "# id 7-0\tdomain=train\nthe _ _ O\nking _ _ B-PER\n", {}, "the/O king/B-PER"),
        ("x.conll", "# O\nAnna B-PER\n#tag O\n", {}, "#/O Anna/B-PER #tag/O"),
        ("x.conll", "#begin document (a); part 0\nAnna B-PER\n\n#end document\n", {}, "Anna/B-PER"),
        ("x.conll", "\ufeff# one\r\nAnna B-PER\r\nleft O\r\n", {}, "Anna/B-PER left/O"),
        (
            "x.txt",
            "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n",
            {},
            "EU/B-ORG rejects/O",
        ),
        ("x.conll", "1 Anna B-PER\n2 left O\n\n1 He O\n", {}, "Anna/B-PER left/O"),
        ("x.conll", "10\u00a0000 O\nAnna B-PER\n", {}, "10\u00a0000/O Anna/B-PER"),
        ("x.bio", "the _ _ O\ncat _ _ O\n", {}, "the/O cat/O"),
        ("x.conll", "Anna B-PER 0\nleft O 0\n", {"label_column": "2"}, "Anna/B-PER left/O"),
        (
            "x.conll",
            "B-PER Anna\nO left\n",
            {"text_column": ("2",), "label_column": "1"},
            "Anna/B-PER left/O",
        ),
        ("x.csv", "Anna,B-PER\nleft,O\n", {"delimiter": ","}, "Anna/B-PER left/O"),
    ],
)
def test_words_and_labels_are_found(
    name: str, content: str, options: dict[str, Any], first: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    words, labels = _read(path, **options)[0]
    assert " ".join(map("/".join, zip(words, labels, strict=True))) == first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.conll",
            "Anna B-PER 0\nleft O 0\n",
            r"line 1: which of the 3 columns .*--label_column N",
        ),
        ("x.conll", "dogs dog NOUN\n", "which of the 3 columns .* dogs | dog | NOUN"),
        ("x.conll", "B-PER Anna\nO left\n", "which of the 2 columns"),
        ("x.conll", "Anna B-PER O\nGreen B-ORG B-LOC\n", "which of the 3 columns"),
        ("x.conllu", "1\ta\ta\t_\tDT\t_\t2\tdet\t_\t_\n", "which of the 10 columns"),
        ("x.conllu", "Anna B-PER\n", "should have the ten columns of CoNLL-U"),
        ("x.conll", "Anna B-PER\nNew York B-LOC\n\na O\n", "line 2 should have 2 columns, found 3"),
        ("x.conll", "Anna B-PER\n# a comment within\n\na O\n", "line 2 should have 2 columns"),
        ("x.conll", "Anna\tB-PER\n\tO\n", "line 2 should be a word and its label"),
    ],
)
def test_a_label_in_doubt_is_asked_for(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RowError, match=message):
        _read(tmp_path / name)


def test_a_sentence_with_a_bad_line_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.conll"
    path.write_text("Anna B-PER\nNew York B-LOC\n\nthe O\n")
    assert _read(path, on_bad_row="skip") == [(["the"], ["O"])]
    assert "skipped 1 bad row; the first" in caplog.text


def test_columns_that_do_not_exist_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    path.write_text("Anna B-PER\n")
    for name in ("0", "3", "ner"):
        with pytest.raises(
            RowError, match=f"--label_column should be a number from 1 to 2; found '{name}'"
        ):
            _read(path, label_column=name)
    with pytest.raises(RowError, match="column 2 cannot be both word and label"):
        _read(path, text_column=("2",))
