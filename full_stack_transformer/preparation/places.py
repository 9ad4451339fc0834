"""Where a preparation writes its dataset: a directory, or object storage by way of a directory.

    on a disk          DATASETS_ROOT/NAME/.partial-…            ──renamed──> DATASETS_ROOT/NAME/VERSION/
    in object storage  ~/.cache/…/staging/…/.partial-…             ──sent──> URL/NAME/VERSION/…

In object storage a version is claimed first (claim.json), finished shards are sent and removed here, and
description.json is sent last: without it there is no dataset. The partial directory remembers which version
it has claimed and what was sent, so that --resume goes on there.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import POSITIONS_FILE_NAME
from full_stack_transformer.datasets.files import CLAIM_FILE_NAME
from full_stack_transformer.datasets.shard_writer import (
    SHARDS_FILE_NAME,
    read_shards,
    shard_file_names,
)
from full_stack_transformer.datasets.shards import shard_file_name
from full_stack_transformer.errors import FullStackTransformerError, MachineError
from full_stack_transformer.object_cache import default_directory
from full_stack_transformer.object_storage import ObjectPath, ObjectStore, is_url, open_store
from full_stack_transformer.preparation.journal import (
    JOURNAL_FILE_NAME,
    Journal,
    Progress,
)
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    file_facts,
    files_below,
    new_version,
    partial_directory,
    read_json,
    write_json,
)

logger = logging.getLogger(__name__)

DIGESTS_FILE_NAME = "digests.bin"
_DESTINATION_FILE_NAME = "destination.json"
_SENT_FILE_NAME = "sent.jsonl"
# Of the preparation, not of the dataset.
_WORKING_FILE_NAMES = {
    *(JOURNAL_FILE_NAME, DIGESTS_FILE_NAME, SHARDS_FILE_NAME),
    *(_DESTINATION_FILE_NAME, _SENT_FILE_NAME),
}


class Version(Protocol):
    """The version that is written; `directory` is temporary inside the `with` and final after it."""

    directory: Path


class Sending:
    """Sends the finished shards of a preparation to object storage, and remembers which.

    Args:
        directory: the partial directory.
        store: of the version.
        count: histogram of the lengths of the samples of a positions file that ends after so many tokens.
    """

    def __init__(
        self, directory: Path, store: ObjectStore, count: Callable[[Path, int], NDArray[np.int64]]
    ) -> None:
        self._directory, self._store, self._count = directory, store, count
        self.facts: dict[str, dict[str, str | int]] = {}
        """Size and SHA-256 of the files of all shards that were sent."""
        self.num_sent: dict[str, int] = {}
        """Shards of each split that were sent: the first so many."""
        self.lengths: dict[str, NDArray[np.int64]] = {}
        """Histogram of the lengths of their samples."""
        path = directory / _SENT_FILE_NAME
        content = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = content[: content.rfind("\n") + 1]
        if len(whole) < len(content):  # the last line was cut off, as in a power cut
            os.truncate(path, len(whole.encode()))
        for line in whole.splitlines():
            self._take(json.loads(line))

    def send(self, progress: Progress) -> None:
        """Send the finished shards that this progress covers, which is in the journal.

        A document that is open may be dropped with all of its samples, so its shards stay here until it ends.
        """
        for split, state in progress.splits.items():
            safe = state.samples.num_samples
            if state.open_document is not None:
                safe = min(safe, state.open_document.counts_before.num_samples)
            end = 0
            for index, shard in enumerate(read_shards(self._directory / split)):
                end += shard.num_samples
                is_covered = end < safe or (progress.is_done and end <= safe)
                if is_covered and index >= self.num_sent.get(split, 0):
                    self._send(split, index, shard.num_tokens)

    def _send(self, split: str, index: int, num_tokens: int) -> None:
        directory = self._directory / split
        paths = [directory / name for name in shard_file_names(index, has_answers=False)]
        positions = directory / shard_file_name(POSITIONS_FILE_NAME, index)
        counts = self._count(positions, num_tokens)
        facts = {}
        for path in paths:
            name = f"{split}/{path.name}"
            facts[name] = file_facts(path)
            self._store.put_file(path, name)
        record = {"split": split, "lengths": counts.tolist(), "files": facts}
        with (self._directory / _SENT_FILE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(record)
        for path in paths:
            path.unlink()

    def _take(self, record: Mapping[str, Any]) -> None:
        split, lengths = record["split"], np.array(record["lengths"], dtype=np.int64)
        self.facts |= record["files"]
        self.num_sent[split] = self.num_sent.get(split, 0) + 1
        self.lengths[split] = self.lengths.get(split, np.zeros_like(lengths)) + lengths


@contextlib.contextmanager
def open_version(
    arguments: PrepareDatasetArguments, *, mark: str | None = None
) -> Iterator[Version]:
    """The next version of the dataset, where --datasets_root says; complete after the `with`, or absent.

    Args:
        arguments: the options.
        mark: fingerprint of options and inputs; with --resume an interrupted run with the same is continued.

    Raises:
        MachineError: the disk is full, or the store does not answer; then --resume goes on.
    """

    def adopt(directory: Path) -> bool:
        return arguments.resume and mark is not None and Journal.fingerprint_of(directory) == mark

    if is_url(arguments.datasets_root):
        with _stored_version(arguments, adopt) as version:
            yield version
        return
    with new_version(arguments.datasets_root, arguments.dataset_name, adopt=adopt) as disk:
        yield disk
        for path in files_below(disk.directory):
            if path.name in _WORKING_FILE_NAMES:
                path.unlink()


@dataclasses.dataclass
class StoredVersion:
    """A version in object storage; `directory` is the partial one, and at last the URL."""

    directory: Path
    store: ObjectStore


@contextlib.contextmanager
def _stored_version(
    arguments: PrepareDatasetArguments, adopt: Callable[[Path], bool]
) -> Iterator[StoredVersion]:
    root = open_store(arguments.datasets_root, "--datasets_root").below(arguments.dataset_name)
    name = hashlib.sha256(root.url.encode()).hexdigest()[:16]
    staging = default_directory().parent / "staging" / name

    def adopt_or_discard(directory: Path) -> bool:
        is_ours = adopt(directory) and (directory / _DESTINATION_FILE_NAME).is_file()
        if not is_ours:
            _discard(directory, root)
        return is_ours

    with partial_directory(staging, adopt=adopt_or_discard, keep=MachineError) as directory:
        version = StoredVersion(directory, _claimed(directory, root))
        try:
            yield version
            _send_rest(version)
        except MachineError as error:
            if arguments.conversations or arguments.preferences:
                raise
            raise MachineError(
                f"{error} (the same command with --resume goes on from {directory})"
            ) from error
        except Exception:
            _discard(directory, root)
            raise
        version.directory = ObjectPath(version.store.url)


def _claimed(directory: Path, root: ObjectStore) -> ObjectStore:
    """The version that this partial directory has claimed, or now claims."""
    path = directory / _DESTINATION_FILE_NAME
    if path.is_file():
        return root.below(str(read_json(path)["version"]))
    numbers = [int(name) for name in root.folders() if name.isdecimal()]
    number = max(numbers, default=-1) + 1
    content = json.dumps({"writer": os.urandom(16).hex()}).encode()
    while not root.create(f"{number}/{CLAIM_FILE_NAME}", content):
        number += 1
    write_json(path, {"version": number, "claim": content.decode()})
    return root.below(str(number))


def _send_rest(version: StoredVersion) -> None:
    """Send what was not sent yet, the description last."""
    directory = version.directory
    for path in files_of_dataset(directory):
        version.store.put_file(path, path.relative_to(directory).as_posix())
    version.store.put(DESCRIPTION_FILE_NAME, (directory / DESCRIPTION_FILE_NAME).read_bytes())


def _discard(directory: Path, root: ObjectStore) -> None:
    """Remove the objects of an interrupted preparation that nobody goes on with."""
    path = directory / _DESTINATION_FILE_NAME
    if not path.is_file():
        return
    destination = read_json(path)
    store = root.below(str(destination["version"]))
    try:
        if store.exists(DESCRIPTION_FILE_NAME) or not store.exists(CLAIM_FILE_NAME):
            return
        if store.read(CLAIM_FILE_NAME).decode() != destination["claim"]:
            return
        logger.info("removing the incomplete %s", store.url)
        for name in sorted(store.names(), key=lambda name: name == CLAIM_FILE_NAME):
            store.remove(name)
    except FullStackTransformerError as error:
        logger.warning("the incomplete %s stays; remove it: %s", store.url, error)


def files_of_dataset(directory: Path) -> list[Path]:
    """The files that the description lists, sorted by path."""
    others = {*_WORKING_FILE_NAMES, DESCRIPTION_FILE_NAME}
    return [path for path in files_below(directory) if path.name not in others]
