"""The files of a dataset, by their names in it: on a disk, or in object storage through a bounded cache.

Knows nothing of what the files hold, but that arrays are NumPy's.
"""

import hashlib
import json
import logging
import os
import queue
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.arguments.data import DataCacheOptions
from full_stack_transformer.errors import DatasetError, FullStackTransformerError, InputError
from full_stack_transformer.object_cache import (
    CacheFullError,
    LocalCopy,
    ObjectCache,
    default_directory,
)
from full_stack_transformer.object_storage import ObjectPath, ObjectStore, open_store
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME, make_directories

logger = logging.getLogger(__name__)

# Another process of the training gives room within a batch of this one.
_SECONDS_FOR_ROOM = 10.0
_SECONDS_BETWEEN_LOOKS = 0.1

TOKENIZER_DIRECTORY_NAME = "tokenizer"
# In object storage it says which writer has this version.
CLAIM_FILE_NAME = "claim.json"
Values = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class OpenedArray:
    """The array of one file, and what gives the file back."""

    values: Values
    close: Callable[[], None]


class DatasetFiles(ABC):
    """The files of a dataset."""

    @abstractmethod
    def open(self, name: str, length: int, dtypes: Sequence[str]) -> OpenedArray:
        """The array of a file, memory-mapped.

        Args:
            name: of the file, such as `train/corpus.npy`.
            length: values that it must have.
            dtypes: types that they may have.

        Raises:
            DatasetError: it is missing or damaged, or differs from the description.
        """

    @abstractmethod
    def fetch_ahead(self, names: Sequence[str]) -> None:
        """Make these files quick to open, without waiting for them."""


class FilesOnDisk(DatasetFiles):
    """The files of a dataset directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, name: str, length: int, dtypes: Sequence[str]) -> OpenedArray:
        """The array of a file."""
        return OpenedArray(open_array(self._directory / name, length, dtypes), lambda: None)

    def fetch_ahead(self, names: Sequence[str]) -> None:
        """Nothing: the system reads a mapped file ahead."""


class StoredFiles(DatasetFiles):
    """The files of a dataset in object storage.

    Args:
        store: the objects below the dataset's URL.
        cache: of local copies.
        facts: size and SHA-256 of each file, as a description has them.
        when_full: gives back copies that this process has opened; called where they leave no room.
    """

    def __init__(
        self,
        store: ObjectStore,
        cache: ObjectCache,
        facts: Mapping[str, Any],
        when_full: Callable[[], None],
    ) -> None:
        self._store, self._cache, self._facts = store, cache, facts
        self._when_full = when_full
        self._wanted: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._asked: list[str] = []
        self._thread: threading.Thread | None = None

    def open(self, name: str, length: int, dtypes: Sequence[str]) -> OpenedArray:
        """The array of a file, fetched if there is no copy."""
        facts = self._facts_of(name)
        try:
            copy = self._cache.fetch(self._store, name, **facts)
        except CacheFullError:
            copy = self._fetch_in_time(name, facts)
        except InputError as error:
            raise DatasetError(str(error)) from error
        return OpenedArray(open_array(copy.path, length, dtypes), copy.close)

    def _fetch_in_time(self, name: str, facts: dict[str, Any]) -> LocalCopy:
        """The copy as soon as there is room: another process may be just behind this one."""
        self._when_full()
        end = time.monotonic() + _SECONDS_FOR_ROOM
        while True:
            try:
                return self._cache.fetch(self._store, name, **facts)
            except CacheFullError:
                if time.monotonic() > end:
                    raise
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def fetch_ahead(self, names: Sequence[str]) -> None:
        """A thread fetches them, one after the other, as far as there is room."""
        new = [name for name in names if name not in self._asked]
        self._asked = list(names)
        for name in new:
            self._wanted.put(name)
        if new and self._thread is None:
            # A daemon: a training that ends does not wait for it.
            self._thread = threading.Thread(target=self._fetch, daemon=True)
            self._thread.start()

    def _fetch(self) -> None:
        while True:
            name = self._wanted.get()
            if name not in self._asked:  # too late: the training is further
                continue
            try:
                self._cache.fetch(self._store, name, **self._facts_of(name)).close()
            except (FullStackTransformerError, OSError) as error:  # whoever needs the file is told
                logger.debug("not fetched ahead: %s", error)

    def _facts_of(self, name: str) -> dict[str, Any]:
        try:
            facts = self._facts[name]
            return {"size": int(facts["size_bytes"]), "sha256": str(facts["sha256"])}
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"description.json of {self._store.url} has no size and SHA-256 of {name}; prepare the "
                "dataset again"
            ) from error


@dataclass(frozen=True)
class StoredDataset:
    """A dataset in object storage."""

    directory: ObjectPath
    """Its URL as a path."""
    description: dict[str, Any]
    store: ObjectStore
    cache: ObjectCache
    tokenizer_directory: Path
    """A local copy."""


def find_stored(place: Path, options: DataCacheOptions | None) -> StoredDataset:
    """The dataset at a URL, or its newest complete version; its tokenizer is fetched.

    Raises:
        DatasetError: there is no complete dataset.
        UsageError: the URL cannot be one of a store.
        MachineError: the store does not answer.
    """
    options = options or DataCacheOptions()
    cache = ObjectCache(options.data_cache or default_directory(), options.cache_bytes)
    store = newest_version(open_store(place, "the dataset"))
    try:
        content = store.read(DESCRIPTION_FILE_NAME)
        description = json.loads(content)
        files = description["output_files"]
        tokenizer_directory = _fetched_tokenizer(store, cache, content, files)
    except (InputError, ValueError, TypeError, KeyError) as error:
        raise DatasetError(
            f"{store.url} is not a complete dataset: {error}; make one with fst prepare_dataset"
        ) from error
    return StoredDataset(ObjectPath(store.url), description, store, cache, tokenizer_directory)


def newest_version(store: ObjectStore) -> ObjectStore:
    """The store itself if it is of one version, else that of the newest complete version below it."""
    if store.exists(DESCRIPTION_FILE_NAME):
        return store
    numbers = sorted((int(name) for name in store.folders() if name.isdecimal()), reverse=True)
    for number in numbers:
        if store.exists(f"{number}/{DESCRIPTION_FILE_NAME}"):
            return store.below(str(number))
    return store


def _fetched_tokenizer(
    store: ObjectStore, cache: ObjectCache, content: bytes, files: Mapping[str, Any]
) -> Path:
    """The tokenizer's files in a directory named after the description, complete or not there."""
    place = cache.directory / "tokenizers" / hashlib.sha256(content).hexdigest()
    if place.is_dir():
        return place
    make_directories(place.parent)
    partial = place.with_name(f".{place.name}-{os.getpid()}-{threading.get_native_id()}")
    shutil.rmtree(partial, ignore_errors=True)
    for name, facts in files.items():
        directory, _, file_name = name.partition("/")
        if directory == TOKENIZER_DIRECTORY_NAME and "/" not in file_name:
            target = partial / file_name
            make_directories(partial)
            target.touch()
            store.download(name, target, int(facts["size_bytes"]), str(facts["sha256"]))
    make_directories(partial)
    try:
        partial.rename(place)
    except OSError:  # another process was faster
        shutil.rmtree(partial, ignore_errors=True)
    return place


def open_array(path: Path, length: int, dtypes: Sequence[str]) -> Values:
    """The array of a .npy file, memory-mapped; raises as `DatasetFiles.open` does."""
    advice = "prepare the dataset again"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        Exception
    ) as error:  # NumPy's parser raises SyntaxError, TokenError … on a damaged header
        raise DatasetError(f"{path} is missing or damaged ({error}); {advice}") from error
    if array.dtype not in [np.dtype(name) for name in dtypes] or array.ndim != 1:
        raise DatasetError(
            f"{path} should be a one-dimensional array of {' or '.join(dtypes)}, found {array.ndim} "
            f"dimensions of {array.dtype.str}; {advice}"
        )
    expected_bytes = array.offset + array.nbytes if isinstance(array, np.memmap) else None
    if len(array) != length or path.stat().st_size != expected_bytes:
        raise DatasetError(
            f"{path} should hold {length:,} values as described, found {len(array):,} in "
            f"{path.stat().st_size:,} bytes; {advice}"
        )
    opened: NDArray[np.integer] = array
    return opened
