"""The sharded form of a dataset reads like the single form, byte by byte."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from full_stack_transformer.arguments.data import PrepareDatasetArguments, VerifyDatasetArguments
from full_stack_transformer.datasets.batches import (
    BatchPlan,
    ConcatenatedSamples,
    LengthBatches,
    PackedBatches,
    SortedBatches,
)
from full_stack_transformer.datasets.conversations import Conversations, PreferencePairs
from full_stack_transformer.datasets.corpus import Corpus, open_dataset, open_split
from full_stack_transformer.datasets.order import SHARDS_TOGETHER, ShardedPermutation
from full_stack_transformer.datasets.shard_writer import (
    SHARDS_FILE_NAME,
    ShardedCorpusWriter,
    read_shards,
)
from full_stack_transformer.datasets.verify import main as verify_dataset
from full_stack_transformer.errors import DatasetError, UsageError
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from tests.datasets.corpora import VOCAB_SIZE, short_lengths, write_corpus

ROW_LENGTH = 256


def _tokens(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, VOCAB_SIZE, count)


def _opened(directory: Path, *, has_answers: bool = False) -> Corpus:
    shards = read_shards(directory)
    (directory / SHARDS_FILE_NAME).unlink()
    description = {
        "kind": "conversations" if has_answers else "documents",
        "vocab_size": VOCAB_SIZE,
        "number_of_train_samples": sum(shard.num_samples for shard in shards),
        "number_of_train_tokens": sum(shard.num_tokens for shard in shards),
        "shards": {"train": list(map(dataclasses.asdict, shards))},
    }
    return open_split(directory.parent, description, "train")


def _write_shards(
    directory: Path, lengths: NDArray[np.int64], *, max_bytes: int = 4096, at_once: int = 100
) -> Corpus:
    """The samples of `write_corpus`, appended a few at a time."""
    tokens = np.split(_tokens(int(lengths.sum())), np.cumsum(lengths)[:-1])
    with ShardedCorpusWriter(directory, VOCAB_SIZE, max_bytes=max_bytes) as writer:
        for first in range(0, len(lengths), at_once):
            part = slice(first, first + at_once)
            writer.append(np.concatenate(tokens[part]), lengths[part])
    return _opened(directory)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """2,000 samples in one file, and in about 40 shards."""
    root = tmp_path_factory.mktemp("both")
    lengths = short_lengths(2000)
    return write_corpus(root / "single" / "train", lengths), _write_shards(
        root / "shards" / "train", lengths
    )


def test_all_reads_equal_those_of_one_file(both: tuple[Corpus, Corpus]) -> None:
    single, shards = both
    assert shards.layout is not None and len(shards.layout.borders) > 30
    assert shards.num_tokens == single.num_tokens and len(shards) == len(single)
    assert np.array_equal(np.asarray(shards.tokens), single.tokens)
    assert np.array_equal(np.asarray(shards.start_positions), single.start_positions)
    assert np.array_equal(shards.lengths(), single.lengths())
    draws = np.random.default_rng(2)
    indices = np.concatenate([draws.integers(0, len(single), 500), [0, len(single) - 1]])
    for found, expected in zip(shards.spans(indices), single.spans(indices), strict=True):
        assert np.array_equal(found, expected)
    for found, expected in zip(
        shards.gather(indices.tolist()), single.gather(indices.tolist()), strict=True
    ):
        assert np.array_equal(found, expected)
    starts = single.spans(indices)[0]
    assert np.array_equal(shards.windows(starts, 40), single.windows(starts, 40))
    assert np.array_equal(shards.samples_at(starts), indices)
    assert np.array_equal(shards.tokens[150:9000], single.tokens[150:9000])
    one, other = (corpus.without_first(5) for corpus in both)
    assert np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(one.start_positions, other.start_positions)


def test_a_shard_is_as_large_as_allowed_and_no_larger(tmp_path: Path) -> None:
    lengths = np.array([100, 100, 5000, 7, 7, 7, 100] * 20)
    corpus = _write_shards(tmp_path / "train", lengths, at_once=3)
    assert corpus.layout is not None
    borders = corpus.layout.borders
    for index, (first, end) in enumerate(itertools.pairwise(borders.tolist())):
        files = (tmp_path / "train").glob(f"*-{index:05d}.npy")
        size = sum(path.stat().st_size for path in files)
        assert size <= 4096 or end - first == 1
        if end < len(lengths):
            assert size + lengths[end] * 2 + 8 > 4096, "the next would fit"


@pytest.mark.parametrize("at_once", [1, 7, 2000])
def test_the_shards_do_not_depend_on_how_they_were_written(
    both: tuple[Corpus, Corpus], at_once: int, tmp_path: Path
) -> None:
    directory = tmp_path / "train"
    _write_shards(directory, short_lengths(2000), at_once=at_once)
    _assert_equal_files(directory, both[1].directory)


def _assert_equal_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_cut_goes_back_over_shards(both: tuple[Corpus, Corpus], tmp_path: Path) -> None:
    """At any sample, also at the border of a shard; and again after the process ended."""
    lengths = short_lengths(2000)
    tokens, ends = _tokens(int(lengths.sum())), np.cumsum(lengths)
    layout = both[1].layout
    assert layout is not None
    directory = tmp_path / "train"
    place = 0
    for cut in (0, 1, int(layout.borders[3]), int(layout.borders[3]) + 1, 700, 0, 900):
        known: dict[str, Any] = {
            "num_samples": place,
            "num_tokens": int(ends[place - 1]) if place else 0,
        }
        writer = ShardedCorpusWriter(directory, VOCAB_SIZE, max_bytes=4096, **known)
        place = min(cut, place)
        writer.cut(num_samples=place, num_tokens=int(ends[place - 1]) if place else 0)
        first, place = place, max(cut, 1100)
        writer.append(
            tokens[ends[first - 1] if first else 0 : ends[place - 1]], lengths[first:place]
        )
        writer.flush()
        writer._abandon()  # killed
    known = {"num_samples": place, "num_tokens": int(ends[place - 1])}
    with ShardedCorpusWriter(directory, VOCAB_SIZE, max_bytes=4096, **known) as writer:
        writer.append(tokens[ends[place - 1] :], lengths[place:])
    _opened(directory)
    _assert_equal_files(directory, both[1].directory)


def test_an_order_has_every_sample_once_and_few_shards_at_a_time() -> None:
    borders = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(0, 90, 23))])
    order = ShardedPermutation(borders, seed=3, epoch=1)
    indices = order[np.arange(len(order))]
    assert sorted(indices.tolist()) == list(range(int(borders[-1])))
    shards = np.searchsorted(borders, indices, side="right") - 1
    for first in range(0, len(order) - 50, 50):
        group = set(shards[first : first + 50].tolist())
        assert len(group) <= 2 * SHARDS_TOGETHER
        assert group <= set(order.shards_from(first))
    assert np.array_equal(order[np.array([5, 900])], indices[[5, 900]]), "any position alone"
    other = ShardedPermutation(borders, seed=3, epoch=2)
    assert not np.array_equal(indices, other[np.arange(len(order))])
    few = np.abs(np.diff(indices))
    assert np.mean(few == 1) < 0.05, "mixed within the group"


def _plans(corpus: Corpus, rank: int, world_size: int) -> list[BatchPlan]:
    facts = {"batch_size": 8 // world_size, "rank": rank, "world_size": world_size}
    pieces = ConcatenatedSamples(corpus.num_tokens, 64, corpus.layout_of_pieces(64))
    return [
        LengthBatches(corpus, seed=0, **facts),
        LengthBatches(pieces, seed=0, **facts),
        PackedBatches(corpus, row_length=ROW_LENGTH, seed=0, **facts),
        SortedBatches(corpus, **facts),
    ]


def test_batches_of_two_processes_are_those_of_one(both: tuple[Corpus, Corpus]) -> None:
    _, shards = both
    alone = _plans(shards, 0, 1)
    ranks = [_plans(shards, rank, 2) for rank in range(2)]
    for number, plan in enumerate(alone):
        starts = []
        for position in range(plan.num_batches_per_epoch):
            own = plan.batch(0, position)
            parts = [plans[number].batch(0, position) for plans in ranks]
            together = [part.starts for part in parts if not part.is_filler]
            assert sorted(own.starts) == sorted(np.concatenate(together))
            starts += own.starts.tolist()
        assert len(starts) == len(set(starts))


def test_a_batch_is_found_without_those_before_it(both: tuple[Corpus, Corpus]) -> None:
    for number, plan in enumerate(_plans(both[1], 0, 1)):
        expected = [
            plan.batch(1, position).starts for position in range(plan.num_batches_per_epoch)
        ]
        again = _plans(both[1], 0, 1)[number]
        for position in (len(expected) - 1, 3):
            assert np.array_equal(again.batch(1, position).starts, expected[position])


def test_a_window_reads_two_groups_of_shards_at_most(both: tuple[Corpus, Corpus]) -> None:
    corpus = both[1]
    layout = corpus.layout
    assert layout is not None
    ahead: list[list[int]] = []
    corpus.layout = dataclasses.replace(
        layout, fetch_ahead=lambda shards: ahead.append(list(shards))
    )
    try:
        for plan in _plans(corpus, 0, 1)[:3]:
            known: set[int] = set()
            for position in range(plan.num_batches_per_epoch):
                spans = plan.batch(0, position)
                found = np.searchsorted(corpus._token_borders, spans.starts, side="right") - 1
                assert len(set(found.tolist())) <= 2 * SHARDS_TOGETHER
                assert not known or set(found.tolist()) <= known, (
                    "fetched ahead by an earlier window"
                )
                known |= {shard for shards in ahead for shard in shards}
    finally:
        corpus.layout = layout


def _arguments(documents_dir: Path, root: Path, **options: Any) -> PrepareDatasetArguments:
    return PrepareDatasetArguments(
        **{
            "documents_train_file": (documents_dir / "train.txt",),
            "documents_valid_file": (documents_dir / "valid.txt",),
            "datasets_root": root,
            "dataset_name": "tiny",
            "vocab_size": 300,
            "max_sample_length": 64,
            **options,
        }
    )


@pytest.fixture(scope="module")
def prepared(documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents of `dataset_dir` in shards of 2 KiB and a tokenizer of its own."""
    root = tmp_path_factory.mktemp("prepared")
    return prepare_dataset(_arguments(documents_dir, root, max_shard_bytes="4KiB"))


def test_a_dataset_in_shards_concatenates_to_the_single_form(
    prepared: Path, dataset_dir: Path
) -> None:
    """The same tokens; positions count from the start of their shard."""
    shards, single = open_dataset(prepared), open_dataset(dataset_dir)
    assert shards.description["format_version"] == 2
    for split in ("train", "valid"):
        counts = shards.description["shards"][split]
        files = [prepared / split / f"corpus-{index:05d}.npy" for index in range(len(counts))]
        assert np.array_equal(
            np.concatenate([np.load(path) for path in files]),
            np.load(dataset_dir / split / "corpus.npy"),
        )
        offset, starts = 0, []
        for index, one in enumerate(counts):
            part = np.load(prepared / split / f"sample_start_positions-{index:05d}.npy")
            assert part[0] == 0 and len(part) == one["num_samples"]
            starts.append(part + offset)
            offset += one["num_tokens"]
        assert np.array_equal(
            np.concatenate(starts), np.load(dataset_dir / split / "sample_start_positions.npy")
        )
    assert len(shards.description["shards"]["train"]) > 4
    for key in ("counts", "sample_lengths", "vocab_size", "dtype"):
        assert shards.description[key] == single.description[key]
    verify_dataset(VerifyDatasetArguments(prepared))


def _damage_tokens(directory: Path) -> None:
    path = directory / "train" / "corpus-00001.npy"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


def _damage_counts(directory: Path) -> None:
    path = directory / "description.json"
    content = json.loads(path.read_text("utf-8"))
    content["shards"]["train"][0]["num_samples"] += 1
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage_tokens, "train/corpus-00001.npy: other content"),
        (lambda one: (one / "train" / "corpus-00002.npy").unlink(), "corpus-00002.npy: is missing"),
        (lambda one: (one / "train" / "corpus.npy").touch(), "train/corpus.npy: unexpected file"),
        (_damage_counts, "lists train shards that do not add up"),
    ],
    ids=["a bit", "a shard", "a stray file", "counts"],
)
def test_what_is_damaged_is_named(
    prepared: Path, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(DatasetError, match=message):
        verify_dataset(VerifyDatasetArguments(copy))


def test_another_format_is_refused(prepared: Path, tmp_path: Path) -> None:
    """As a release that knows the single form alone refuses this one."""
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    path = copy / "description.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "format_version": 3}))
    with pytest.raises(DatasetError, match="format version 3, expected 2; prepare"):
        open_dataset(copy)


def test_a_size_that_is_none_is_a_usage_error(documents_dir: Path, tmp_path: Path) -> None:
    for size, message in (("many", "such as 2GB"), ("12", "at least 4,096, found '12'")):
        with pytest.raises(UsageError, match=f"--max_shard_bytes must be .*{message}"):
            _arguments(documents_dir, tmp_path, max_shard_bytes=size)


def _conversation_rows(kind: str) -> list[dict[str, Any]]:
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "looked", "at", "the", "moon"]
    rows: list[dict[str, Any]] = []
    for number in range(60):
        question = {"role": "user", "content": f"question {number}"}
        answer = {"role": "assistant", "content": " ".join(words[: 2 + number % 9]) + f" {number}"}
        other = {"role": "assistant", "content": f"no {number}"}
        if kind == "preferences":
            rows.append({"prompt": [question], "chosen": [answer], "rejected": [other]})
        else:
            rows.append({"messages": [question, answer]})
    return rows


@pytest.mark.parametrize("kind", ["conversations", "preferences"])
def test_conversations_are_the_same_in_shards(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in _conversation_rows(kind)))
    opened = []
    for size in (None, "4096"):
        arguments = PrepareDatasetArguments(
            **{kind: (path,)},  # type: ignore[arg-type]
            dataset_name="talk",
            datasets_root=tmp_path / str(size),
            vocab_size=300,
            max_shard_bytes=size,
            validation_fraction=0.2,
        )
        opened.append(open_dataset(prepare_dataset(arguments)))
        verify_dataset(VerifyDatasetArguments(opened[-1].directory))
    single, shards = (dataset.train for dataset in opened)
    assert shards.layout is not None and len(shards.layout.borders) > 2
    assert np.array_equal(np.asarray(shards.learned), np.asarray(single.learned))
    reader = PreferencePairs if kind == "preferences" else Conversations
    one, other = (reader(corpus, 60) for corpus in (single, shards))
    indices = np.arange(len(one))
    for found, expected in zip(other.spans(indices), one.spans(indices), strict=True):
        assert np.array_equal(found, expected)
    if kind == "preferences":
        assert not (np.diff(shards.layout.borders) % 2).any(), "pairs stay together"
    assert other.layout is not None and other.layout.borders[-1] == len(other)
    plan = LengthBatches(other, batch_size=4, seed=0)
    starts = [plan.batch(0, place).starts for place in range(plan.num_batches_per_epoch)]
    assert sorted(np.concatenate(starts)) == sorted(one.spans(indices)[0])
