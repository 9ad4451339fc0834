"""A dataset that is written into object storage has the bytes of one on a disk, and is complete or unseen."""

import dataclasses
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer import object_storage
from full_stack_transformer.arguments.data import (
    DataCacheOptions,
    PrepareDatasetArguments,
    VerifyDatasetArguments,
)
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.datasets.verify import main as verify_dataset
from full_stack_transformer.documents import delimited
from full_stack_transformer.errors import DatasetError, MachineError
from full_stack_transformer.object_storage import ObjectStore
from full_stack_transformer.preparation import encoding, journal
from full_stack_transformer.preparation.encoding import EncodedBlock, Workers
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from full_stack_transformer.storage import files_below
from tests.conftest import write_documents
from tests.object_store import BUCKET, S3Server

ROOT = f"s3://{BUCKET}/datasets"


@pytest.fixture(autouse=True)
def _small(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, a staging directory of the test, and short waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(object_storage, "_FIRST_WAIT_SECONDS", 0.001)
    for module in (delimited, encoding):
        monkeypatch.setattr(module, "BLOCK_BYTES", 2500)
    monkeypatch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 100)
    monkeypatch.setattr(journal, "_SECONDS_BETWEEN_LINES", 0.05)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, and a giant one in the middle, which is in many shards."""
    directory = tmp_path_factory.mktemp("documents")
    write_documents(directory / "train.txt", num_documents=60)
    text = (directory / "train.txt").read_text()
    giant = " ".join(f"word{number}" for number in range(1500))
    (directory / "train.txt").write_text(f"{text}{giant}\n[END_OF_DOCUMENT]\n{text}")
    write_documents(directory / "valid.txt", num_documents=20, first=1000)
    return directory


def _arguments(documents: Path, root: Path, **options: Any) -> PrepareDatasetArguments:
    return PrepareDatasetArguments(
        **{
            "documents_train_file": (documents / "train.txt",),
            "documents_valid_file": (documents / "valid.txt",),
            "datasets_root": root,
            "dataset_name": "tiny",
            "vocab_size": 300,
            "max_sample_length": 64,
            "max_shard_bytes": "4KiB",
            "deduplicate": "exact",
            "num_workers": 1,
            **options,
        }
    )


def _staged(tmp_path: Path) -> int:
    return sum(
        path.stat().st_size for path in files_below(tmp_path / "cache") if path.suffix == ".npy"
    )


def _assert_same_bytes(on_disk: Path, url: str) -> None:
    store = ObjectStore(url)
    names = [path.relative_to(on_disk).as_posix() for path in files_below(on_disk)]
    assert sorted([*names, "claim.json"]) == store.names()
    for name in names:
        if name != "description.json":
            assert store.read(name) == (on_disk / name).read_bytes(), name
    found, expected = (
        json.loads(content)
        for content in (store.read("description.json"), (on_disk / "description.json").read_bytes())
    )
    del found["seconds_taken"], expected["seconds_taken"]
    assert found == expected


def _watching(watch: Callable[[int], None]) -> Callable[..., Generator[EncodedBlock, None, None]]:
    original = Workers.encode

    def encode(*arguments: Any) -> Generator[EncodedBlock, None, None]:
        for number, block in enumerate(original(*arguments)):
            watch(number)
            yield block

    return encode


def test_the_objects_are_the_files_of_a_disk(
    documents: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through errors, with little staged, and unseen until it is complete."""
    on_disk = prepare_dataset(_arguments(documents, tmp_path / "disk"))
    staged: list[int] = []

    def watch(_: int) -> None:
        staged.append(_staged(tmp_path))
        assert not ObjectStore(f"{ROOT}/tiny").exists("0/description.json")

    s3.faults.probability, s3.faults.kinds = 0.1, ("500", "503", "cut", "lost")
    with monkeypatch.context() as patch:
        patch.setattr(Workers, "encode", _watching(watch))
        written = prepare_dataset(_arguments(documents, Path(ROOT)))
    assert str(written) == f"{ROOT}/tiny/0"
    s3.faults.probability = 0.0
    _assert_same_bytes(on_disk, f"{ROOT}/tiny/0")
    assert not files_below(tmp_path / "cache")
    assert staged[-1] < 3 * 4096 + 2 * 2500, "what is finished is sent"
    verify_dataset(VerifyDatasetArguments(written))
    cache = DataCacheOptions(data_cache=tmp_path / "cache", data_cache_bytes="1MB")
    assert len(open_dataset(written, cache).train) == len(open_dataset(on_disk).train)
    again = prepare_dataset(_arguments(documents, Path(ROOT)))
    assert again.name == "1"


@pytest.mark.parametrize(
    "num_blocks", [9, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 14))]
)
def test_an_interrupted_preparation_goes_on(
    num_blocks: int, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = prepare_dataset(_arguments(documents, tmp_path / "disk"))
    arguments = _arguments(documents, Path(ROOT))

    def interrupt(number: int) -> None:
        if number == num_blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "encode", _watching(interrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(arguments)
    sent = set(ObjectStore(f"{ROOT}/tiny/0").names())
    numbers: list[int] = []
    monkeypatch.setattr(Workers, "encode", _watching(numbers.append))
    written = prepare_dataset(dataclasses.replace(arguments, resume=True))
    assert written.name == "0"
    _assert_same_bytes(on_disk, str(written))
    assert sent <= set(ObjectStore(str(written)).names())


@pytest.mark.slow
def test_without_resume_what_was_begun_is_removed(
    documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int) -> None:
        if number == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "encode", _watching(interrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(_arguments(documents, Path(ROOT)))
    assert len(ObjectStore(f"{ROOT}/tiny/0").names()) > 3
    with pytest.raises(DatasetError, match="is not a complete dataset"):
        open_dataset(Path(f"{ROOT}/tiny"))
    written = prepare_dataset(_arguments(documents, Path(ROOT)))
    verify_dataset(VerifyDatasetArguments(written))


def test_a_store_that_fails_leaves_a_run_to_resume(
    documents: Path, s3: S3Server, tmp_path: Path
) -> None:
    arguments = _arguments(documents, Path(ROOT))
    s3.faults.probability, s3.faults.kinds, s3.faults.only = 1.0, ("500",), "corpus-00005.npy"
    with pytest.raises(MachineError, match=r"corpus-00005\.npy failed, tried 6 times.* --resume"):
        prepare_dataset(arguments)
    s3.faults.only = "tokenizer.json"
    with pytest.raises(MachineError, match=r"tokenizer\.json failed"):
        prepare_dataset(dataclasses.replace(arguments, resume=True))
    s3.faults.probability = 0.0
    written = prepare_dataset(dataclasses.replace(arguments, resume=True))
    _assert_same_bytes(prepare_dataset(_arguments(documents, tmp_path / "disk")), str(written))
    assert written.name == "0"


def test_documents_without_samples_leave_nothing(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no valid sample is left"):
        prepare_dataset(
            _arguments(documents, Path(ROOT), min_sample_length=500, max_sample_length=500)
        )
    assert ObjectStore(ROOT).names() == []
    assert not files_below(tmp_path / "cache")


def test_conversations_are_sent_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"ask {n}"},
                {"role": "assistant", "content": f"so {n}"},
            ]
        }
        for n in range(40)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options: dict[str, Any] = {
        "conversations": (path,),
        "dataset_name": "talk",
        "vocab_size": 300,
        "validation_fraction": 0.2,
        "max_shard_bytes": "500MB",
    }
    on_disk = prepare_dataset(PrepareDatasetArguments(**options, datasets_root=tmp_path / "disk"))
    written = prepare_dataset(PrepareDatasetArguments(**options, datasets_root=Path(ROOT)))
    _assert_same_bytes(on_disk, str(written))
