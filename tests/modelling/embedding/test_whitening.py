"""The algebra of whitening: a plain eigen-decomposition, the rank, batches and rounding."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from numpy.typing import NDArray

from full_stack_transformer.errors import DocumentsError
from full_stack_transformer.modelling.embedding.whitening import (
    CovarianceSum,
    fit_whitening,
    read_texts,
)


def _correlated(num_texts: int, width: int, *, rank: int | None = None) -> NDArray[np.float64]:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(rank or width, width))
    return generator.normal(size=(num_texts, rank or width)) @ mixing + generator.normal(size=width)


@pytest.mark.parametrize("num_dimensions", [None, 3])
def test_it_equals_a_plain_eigen_decomposition(num_dimensions: int | None) -> None:
    embeddings = _correlated(200, 8)
    whitening = fit_whitening(embeddings, num_dimensions=num_dimensions)
    centred = embeddings - embeddings.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    order = np.argsort(-variances)[:num_dimensions]
    kernel = directions[:, order] / np.sqrt(variances[order])
    assert np.abs(whitening.mean - embeddings.mean(axis=0)).max() < 1e-12
    # A column may point either way.
    assert np.abs(np.abs(whitening.kernel) - np.abs(kernel)).max() < 1e-6
    assert np.abs(np.abs(whitening.transform(embeddings)) - np.abs(centred @ kernel)).max() < 1e-6


def test_whitened_embeddings_have_no_mean_and_the_identity_as_covariance() -> None:
    whitened = fit_whitening(_correlated(200, 8)).transform(_correlated(200, 8))
    assert np.abs(whitened.mean(axis=0)).max() < 1e-9
    assert np.abs(whitened.T @ whitened / 200 - np.eye(8)).max() < 1e-6


def test_batches_give_what_all_at_once_gives() -> None:
    embeddings = 1e3 + _correlated(100, 6)  # a mean far from zero, where plain sums lose digits
    covariance = CovarianceSum()
    for start in (0, 1, 40, 99):
        covariance.add(embeddings[start : {0: 1, 1: 40, 40: 99, 99: 100}[start]])
    covariance.add(embeddings[:0])
    by_batches, at_once = covariance.whitening(), fit_whitening(embeddings)
    assert by_batches.num_texts == 100
    assert np.allclose(by_batches.mean, at_once.mean)
    assert np.allclose(by_batches.kernel, at_once.kernel)


@pytest.mark.parametrize(
    ("num_texts", "rank", "kept"),
    [(5, None, 4), (100, 3, 3)],
    ids=["fewer-texts-than-dimensions", "dependent-dimensions"],
)
def test_dimensions_without_variance_are_left_out(
    num_texts: int, rank: int | None, kept: int
) -> None:
    embeddings = _correlated(num_texts, 16, rank=rank).astype(np.float32)
    whitening = fit_whitening(embeddings)
    assert whitening.kernel.shape == (16, kept)
    assert np.abs(whitening.transform(embeddings)).max() < 10
    assert fit_whitening(embeddings, num_dimensions=2).kernel.shape == (16, 2)


def test_the_same_embeddings_give_the_same_signs_whatever_the_order() -> None:
    embeddings = _correlated(50, 4)
    one, other = fit_whitening(embeddings), fit_whitening(embeddings[::-1])
    assert np.allclose(one.kernel, other.kernel)


def test_a_larger_epsilon_damps_the_small_directions() -> None:
    embeddings = _correlated(200, 8)
    plain, damped = fit_whitening(embeddings), fit_whitening(embeddings, epsilon=0.5)
    ratio = np.linalg.norm(damped.kernel, axis=0) / np.linalg.norm(plain.kernel, axis=0)
    assert (np.diff(ratio) < 0).all()


@pytest.mark.parametrize("embeddings", [np.ones((1, 3)), np.ones((9, 3)), np.ones((0, 3))])
def test_embeddings_that_are_all_equal_are_refused(embeddings: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="at least two texts"):
        fit_whitening(embeddings)


def _table(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_texts_are_the_cells_of_tables_and_the_lines_of_other_files(tmp_path: Path) -> None:
    fields = ("text", "sentence1")
    rows = [{"text": "one, with a comma", "label": 1}, {"text": "two\nlines", "label": 0}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    table = 'label,text\n1,"one, with a comma"\n0,"two\nlines"\n'
    _table(tmp_path / "x.CSV", f"\ufeff{table}")
    with gzip.open(tmp_path / "x.csv.gz", "wt", encoding="utf-8") as file:
        file.write(table)
    for name in ("x.jsonl", "x.parquet", "x.CSV", "x.csv.gz"):
        assert [*read_texts([tmp_path / name], fields)] == ["one, with a comma", "two\nlines"], name
    tabs = _table(tmp_path / "x.tsv", 'sentence1\tsentence2\nan "open quote\tb\nc\td\n')
    assert [*read_texts([tabs], fields)] == ['an "open quote', "c"]
    lines = _table(tmp_path / "x.txt", "label,text\n\n1,a\n")
    assert [*read_texts([lines], fields)] == ["label,text", "1,a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b\n1,2\n", r"line 1: expected column names, .*found 'a', 'b'.*--text_field"),
        ("x.csv", "", "expected column names"),
        ("x.json", "[]", r"\.json is not read"),
        ("x.html", "<p>", r"\.html is not read"),
        ("x.csv", "text\n\n", "should hold texts under text"),
    ],
    ids=["other columns", "nothing", "json", "html", "no text"],
)
def test_files_whose_lines_are_no_texts_are_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DocumentsError, match=message):
        list(read_texts([_table(tmp_path / name, content)], ["text"]))
