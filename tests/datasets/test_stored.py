"""A dataset in object storage reads like the same files on a disk, through a cache smaller than it."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from full_stack_transformer import object_storage
from full_stack_transformer.arguments.data import (
    DataCacheOptions,
    PrepareDatasetArguments,
    VerifyDatasetArguments,
)
from full_stack_transformer.datasets.batches import LengthBatches
from full_stack_transformer.datasets.collators import PaddedCollator
from full_stack_transformer.datasets.corpus import DatasetDirectory, open_dataset
from full_stack_transformer.datasets.verify import main as verify_dataset
from full_stack_transformer.errors import DatasetError, UsageError
from full_stack_transformer.object_cache import ObjectCache
from full_stack_transformer.object_storage import ObjectStore
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from full_stack_transformer.storage import files_below
from tests.conftest import write_documents
from tests.object_store import BUCKET, S3Server

URL = f"s3://{BUCKET}/datasets/tiny"


@pytest.fixture(scope="module")
def on_disk(documents_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in about 20 shards."""
    return prepare_in_shards(documents_dir, tmp_path_factory.mktemp("shards"))


def prepare_in_shards(documents_dir: Path, root: Path) -> Path:
    """A dataset in about 20 shards, below the root."""
    return prepare_dataset(
        PrepareDatasetArguments(
            documents_train_file=(write_documents(root / "train.txt", num_documents=500),),
            documents_valid_file=(documents_dir / "valid.txt",),
            datasets_root=root,
            dataset_name="tiny",
            vocab_size=300,
            max_sample_length=64,
            max_shard_bytes="4KiB",
        )
    )


def upload(directory: Path, url: str) -> None:
    """Copy a dataset directory, the description last."""
    store = ObjectStore(url)
    for path in reversed(files_below(directory)):
        store.put_file(path, path.relative_to(directory).as_posix())


@pytest.fixture
def stored(on_disk: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in a bucket."""
    monkeypatch.setattr(object_storage, "_FIRST_WAIT_SECONDS", 0.001)
    upload(on_disk, f"{URL}/0")
    return Path(URL)


def _options(tmp_path: Path, size: str = "40KB") -> DataCacheOptions:
    return DataCacheOptions(data_cache=tmp_path / "cache", data_cache_bytes=size)


def _total(directory: Path) -> int:
    return sum(path.stat().st_size for path in files_below(directory / "train"))


def test_batches_are_those_of_the_disk_and_the_cache_stays_small(
    on_disk: Path, stored: Path, s3: S3Server, tmp_path: Path
) -> None:
    s3.faults.probability, s3.faults.kinds = 0.1, ("500", "503", "cut", "slow")
    s3.faults.slow_seconds = 0.01
    options = _options(tmp_path)
    assert _total(on_disk) > 1.2 * options.cache_bytes
    disk, remote = open_dataset(on_disk), open_dataset(stored, options)
    assert str(remote.directory) == f"{URL}/0"
    cache = ObjectCache(tmp_path / "cache", options.cache_bytes)
    plans = [LengthBatches(one.train, batch_size=4, seed=1) for one in (disk, remote)]
    collate = [PaddedCollator(one.train, pad_id=2) for one in (disk, remote)]
    for epoch in range(2):
        for position in range(plans[0].num_batches_per_epoch):
            one, other = (
                make(plan.batch(epoch, position))["input_ids"]
                for make, plan in zip(collate, plans, strict=True)
            )
            assert np.array_equal(one, other)
            assert cache.num_bytes <= options.cache_bytes
    assert len(s3.faults.failed) > 3
    assert json.loads((on_disk / "description.json").read_text()) == remote.description


def test_shards_are_fetched_ahead(stored: Path, tmp_path: Path) -> None:
    dataset = open_dataset(stored, _options(tmp_path, "1MB"))
    assert dataset.train.layout is not None
    dataset.train.layout.fetch_ahead([0, 3])
    cache = ObjectCache(tmp_path / "cache", 1)
    deadline = time.monotonic() + 20
    while len(list((cache.directory / "objects").glob("[0-9a-f]*"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cache_without_room_for_two_windows_is_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--data_cache_bytes must be at least 3\d,\d{3} for s3://"
    ):
        open_dataset(stored, _options(tmp_path, "20KB"))


def test_only_a_complete_version_is_seen(on_disk: Path, stored: Path, tmp_path: Path) -> None:
    ObjectStore(f"{URL}/1").put("train/corpus-00000.npy", b"begun")
    assert open_dataset(stored, _options(tmp_path)).directory.name == "0"
    with pytest.raises(DatasetError, match="s3://bucket/datasets/tiny/1 is not a complete dataset"):
        open_dataset(stored / "1", _options(tmp_path))


def test_the_single_form_is_read_too(
    dataset: DatasetDirectory, s3: S3Server, tmp_path: Path
) -> None:
    upload(dataset.directory, f"{URL}/0")
    remote = open_dataset(Path(URL), _options(tmp_path, "10MB"))
    assert np.array_equal(remote.train.tokens, dataset.train.tokens)
    assert remote.train.layout is None
    assert (remote.tokenizer_directory / "tokenizer.json").is_file()


@pytest.mark.slow
def test_verify_reads_every_object(on_disk: Path, stored: Path, tmp_path: Path) -> None:
    verify_dataset(VerifyDatasetArguments(stored))
    copy = Path(shutil.copytree(on_disk, tmp_path / "copy"))
    content = bytearray((copy / "train" / "corpus-00001.npy").read_bytes())
    content[300] ^= 1
    store = ObjectStore(f"{URL}/0")
    store.put("train/corpus-00001.npy", bytes(content))
    store.put("train/corpus-00002.npy", b"short")
    store.remove("train/corpus-00003.npy")
    store.put("train/more", b"")
    with pytest.raises(DatasetError) as caught:
        verify_dataset(VerifyDatasetArguments(stored))
    for problem in (
        "s3://bucket/datasets/tiny/0 differs",
        "corpus-00001.npy: other content",
        "corpus-00002.npy: truncated",
        "corpus-00003.npy: is missing",
        "train/more: unexpected file",
    ):
        assert problem in str(caught.value)


def test_another_content_than_described_is_an_error(stored: Path, tmp_path: Path) -> None:
    store = ObjectStore(f"{URL}/0")
    store.put("train/corpus-00000.npy", bytes(store.size("train/corpus-00000.npy")))
    dataset = open_dataset(stored, _options(tmp_path))
    with pytest.raises(DatasetError, match=r"corpus-00000\.npy holds other content than described"):
        dataset.train.take(np.arange(5))
