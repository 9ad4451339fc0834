"""One subject of the benchmark of loading: a corpus in its own format, and epochs over it, timed.

python tests/benchmarks/loader_peers.py SUBJECT WORKLOAD_DIRECTORY

`tests/benchmarks/loader.py` starts this once per subject and workload, with another interpreter where a peer
lives in one, and asks for epochs with each line of standard input, so that subjects are interleaved
without importing again. WORKLOAD_DIRECTORY holds a corpus of ours, which a peer first writes again in its
own format. An epoch is everything from asking for the first batch to the last one: batches of 16 rows of
int64, padded on the right, with labels; in random order, without workers, on one thread. Knows nothing of
ratios.
"""

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 16
ROW_LENGTH = 256
PAD_ID = 8192
"""No token of a corpus, so that a checksum can leave it out."""
_IGNORED_LABEL = -100
_MIN_SECONDS = 0.4

Batch = dict[str, Tensor]
Epochs = Callable[[int], Iterable[Batch]]
"""The batches of an epoch by its number."""
Array = NDArray[np.integer[Any]]


def ours(directory: Path, batching: str) -> Epochs:
    """What training uses."""
    from full_stack_transformer.datasets.batches import BatchPlan, LengthBatches, PackedBatches
    from full_stack_transformer.datasets.collators import Collator, PackedCollator, PaddedCollator
    from full_stack_transformer.datasets.corpus import Corpus
    from full_stack_transformer.training.data.batches import BatchLoader

    sizes = json.loads((directory / "sizes.json").read_text())
    corpus = Corpus(directory, **sizes)
    plan: BatchPlan = LengthBatches(corpus, batch_size=BATCH_SIZE, seed=0)
    collate: Collator = PaddedCollator(corpus, pad_id=PAD_ID)
    if batching == "packed":
        plan = PackedBatches(corpus, batch_size=BATCH_SIZE, row_length=ROW_LENGTH, seed=0)
        collate = PackedCollator(corpus, pad_id=PAD_ID, row_length=ROW_LENGTH)
    num_batches = plan.num_batches_per_epoch

    def epoch(number: int) -> BatchLoader:
        loader = BatchLoader(plan, collate, num_batches=(number + 1) * num_batches)
        loader.load_state_dict({"num_batches": number * num_batches})
        return loader

    return epoch


class _AncestorDataset(Dataset[list[int]]):
    """A sample at a time out of the memory map, as a list of Python integers."""

    def __init__(self, directory: Path) -> None:
        self._corpus = np.load(directory / "corpus.npy", mmap_mode="r")
        self._starts = np.load(directory / "sample_start_positions.npy")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> list[int]:
        end = self._starts[index + 1] if index + 1 < len(self) else len(self._corpus)
        token_ids: list[int] = self._corpus[self._starts[index] : end].tolist()
        return token_ids


def ancestor(directory: Path) -> Epochs:
    """The algorithm of 2020: sample by sample in random order, a tensor each, torch pads."""
    loader = DataLoader(
        _AncestorDataset(directory), batch_size=BATCH_SIZE, shuffle=True, collate_fn=_pad_lists
    )
    return lambda number: loader


def _pad_lists(samples: Sequence[list[int]]) -> Batch:
    return _pad_tensors([torch.tensor(sample) for sample in samples])


def _pad_tensors(tensors: list[Tensor]) -> Batch:
    return {
        "input_ids": pad_sequence(tensors, batch_first=True, padding_value=PAD_ID),
        "labels": pad_sequence(tensors, batch_first=True, padding_value=_IGNORED_LABEL),
    }


def _pad_arrays(arrays: Sequence[Array]) -> Batch:
    return _pad_tensors([torch.from_numpy(np.asarray(array, dtype=np.int64)) for array in arrays])


def hf_datasets(directory: Path) -> Epochs:
    """A memory-mapped Arrow file through torch's loader; as lists or arrays, whichever is faster."""
    datasets: Any = importlib.import_module("datasets")

    datasets.disable_progress_bars()
    path = directory / "arrow"
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    samples = {"input_ids": list(_samples(directory, np.int32))}
    datasets.Dataset.from_dict(samples, features=features).save_to_disk(path)
    opened = datasets.load_from_disk(path)
    collates: dict[str | None, Callable[[Any], Batch]] = {
        None: lambda rows: _pad_lists([row["input_ids"] for row in rows]),
        "numpy": lambda rows: _pad_arrays([row["input_ids"] for row in rows]),
    }
    loaders: list[DataLoader[Batch]] = [
        DataLoader(
            opened.with_format(name), batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate
        )
        for name, collate in collates.items()
    ]
    fastest = min(loaders, key=_seconds_of_some_batches)
    return lambda number: fastest


def _seconds_of_some_batches(loader: Iterable[Batch]) -> float:
    started = time.perf_counter()
    for _, _ in zip(range(100), loader, strict=False):
        pass
    return time.perf_counter() - started


def litdata_samples(directory: Path) -> Epochs:
    """A chunk of samples of any length on the local disk, through its own loader."""
    litdata: Any = importlib.import_module("litdata")

    path = _write_litdata(directory, None)
    loader = litdata.StreamingDataLoader(
        litdata.StreamingDataset(str(path), shuffle=True),
        batch_size=BATCH_SIZE,
        collate_fn=_pad_arrays,
    )
    return lambda number: loader


def litdata_tokens(directory: Path) -> Epochs:
    """Blocks of one length out of a chain of tokens, as it loads for language models."""
    litdata: Any = importlib.import_module("litdata")

    path = _write_litdata(directory, litdata.TokensLoader(block_size=ROW_LENGTH))
    dataset = litdata.StreamingDataset(
        str(path), shuffle=True, item_loader=litdata.TokensLoader(block_size=ROW_LENGTH)
    )
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH_SIZE)

    def epoch(number: int) -> Iterator[Batch]:
        for block in loader:
            input_ids = block.long()
            yield {"input_ids": input_ids, "labels": input_ids.clone()}

    return epoch


def _write_litdata(directory: Path, item_loader: Any) -> Path:
    writers: Any = importlib.import_module("litdata.streaming.writer")

    path = directory / "litdata"
    path.mkdir()
    writer = writers.BinaryWriter(str(path), chunk_bytes=64 << 20, item_loader=item_loader)
    for index, sample in enumerate(_samples(directory, np.int32)):
        writer[index] = sample if item_loader is None else torch.from_numpy(sample)
    writer.done()
    writer.merge(1)
    return path


def _samples(directory: Path, dtype: type[np.integer[Any]]) -> Iterator[Array]:
    tokens = np.load(directory / "corpus.npy").astype(dtype)
    starts = np.load(directory / "sample_start_positions.npy")
    yield from np.split(tokens, starts[1:])


SUBJECTS: dict[str, tuple[Callable[[Path], Epochs], tuple[str, ...]]] = {
    "ours": (lambda directory: ours(directory, "length"), ()),
    "ours packed": (lambda directory: ours(directory, "packed"), ()),
    "ancestor": (ancestor, ()),
    "datasets": (hf_datasets, ("datasets", "pyarrow")),
    "litdata": (litdata_samples, ("litdata",)),
    "litdata tokens": (litdata_tokens, ("litdata",)),
}


def check(batches: Iterable[Batch]) -> dict[str, int]:
    """What one epoch holds: the same for every subject that hands out every token once."""
    num_batches, num_tokens, token_sum, num_slots = 0, 0, 0, 0
    for batch in batches:
        real = batch["input_ids"][batch["input_ids"] != PAD_ID]
        num_batches += 1
        num_tokens += len(real)
        token_sum += int(real.sum())
        num_slots += batch["labels"].numel()
    return {
        "num_batches": num_batches,
        "num_tokens": num_tokens,
        "token_sum": token_sum,
        "num_slots": num_slots,
    }


def main() -> None:
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # litdata talks
    subject, directory = sys.argv[1], Path(sys.argv[2])
    make, packages = SUBJECTS[subject]
    with contextlib.redirect_stdout(sys.stderr):
        epochs = make(directory)
        first = check(epochs(0))
    versions = {name: version(name) for name in ("torch", "numpy", *packages)}
    print(json.dumps({"versions": versions, **first}), file=answers, flush=True)
    number = 0
    for _ in sys.stdin:
        started, num_epochs = time.perf_counter(), 0
        # A fast subject runs as long as a slow one, so that a disturbance weighs the same.
        while time.perf_counter() - started < _MIN_SECONDS:
            number, num_epochs = number + 1, num_epochs + 1
            for _ in epochs(number):
                pass
        print((time.perf_counter() - started) / num_epochs, file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
