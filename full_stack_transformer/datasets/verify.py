"""`fst verify_dataset`: compare every byte of a dataset directory with its description.

    description -> size and hash of every file -> header, ids and positions of the arrays

Reads every file once, in blocks, and reports all problems, not only the first. Opening a dataset checks sizes
only; this finds a flipped bit. Knows nothing of tokenizers.
"""

import hashlib
import json
import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from full_stack_transformer.arguments.data import VerifyDatasetArguments
from full_stack_transformer.datasets.corpus import (
    CORPUS_FILE_NAME,
    FORMAT_VERSION,
    LEARNED_DTYPE,
    LEARNED_FILE_NAME,
    POSITION_DTYPE,
    POSITIONS_FILE_NAME,
    SHARDED_FORMAT_VERSION,
    SPLITS,
    open_dataset,
    refuse_model,
    token_dtype,
)
from full_stack_transformer.datasets.files import CLAIM_FILE_NAME, newest_version
from full_stack_transformer.datasets.shards import (
    ShardCounts,
    described_shards,
    shard_file_name,
)
from full_stack_transformer.datasets.verify_arrays import ArrayCheck, Ids, Marks, Positions
from full_stack_transformer.errors import DatasetError, InputError
from full_stack_transformer.object_storage import ObjectPath, ObjectStore, is_url, open_store
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME, read_json, versions

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(.+)-(\d{5,})\.npy")
_BLOCK_BYTES = 4 << 20  # a multiple of every item size
_MAX_STRAY_FILES = 20  # of a whole foreign folder a count is enough
_SHA256 = re.compile(r"[0-9a-f]{64}")


def main(arguments: VerifyDatasetArguments) -> None:
    """Check every file of a dataset directory.

    Raises:
        DatasetError: there is no dataset directory, or it has problems: one line for each.
    """
    started = time.perf_counter()
    place: _Place
    if is_url(arguments.dataset_dir):
        place = _StoredPlace(newest_version(open_store(arguments.dataset_dir, "DATASET_DIR")))
    else:
        place = _Directory(_find(arguments.dataset_dir))
        refuse_model(place.directory)
    directory = place.directory
    description = _read_description(place)
    described = _Described.of(description)
    num_bytes = 0
    for name in sorted(described.files):
        num_bytes += _check_file(place, name, described)
    try:
        problems = [*described.problems, *_stray_files(place, described.files)]
    except OSError as error:
        problems = [*described.problems, f"its files cannot be listed: {error.strerror or error}"]
    if not problems and isinstance(place, _Directory):
        problems += _cannot_be_opened(directory)
    if problems:
        raise DatasetError(
            f"{directory} differs from its description ({len(problems)} problems):\n"
            + "".join(f"  {problem}\n" for problem in problems)
            + "prepare the dataset again, or copy it again from an intact copy"
        )
    seconds = time.perf_counter() - started
    logger.info(
        "%s is intact: %s files, %s bytes, all as described; %.2f s, %s MB/s",
        directory,
        f"{len(described.files):,}",
        f"{num_bytes:,}",
        seconds,
        f"{num_bytes / seconds / 1e6:,.0f}",
    )


def _find(path: Path) -> Path:
    """`path`, or the newest version if it is DATASETS_ROOT/NAME."""
    if path.is_dir() and not (path / DESCRIPTION_FILE_NAME).exists():
        return (versions(path.parent, path.name) or [path])[-1]
    return path


class _Place(ABC):
    """Where the files are."""

    directory: Path

    @abstractmethod
    def read_description(self) -> dict[str, Any]:
        """The content of description.json."""

    @abstractmethod
    def names(self) -> list[str]:
        """All files, sorted."""

    @abstractmethod
    def why_no_file(self, name: str) -> str:
        """What is wrong with a name; empty if it is that of a file."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file, to be read."""


class _Directory(_Place):
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read_description(self) -> dict[str, Any]:
        return read_json(self.directory / DESCRIPTION_FILE_NAME)

    def names(self) -> list[str]:
        return sorted(
            path.relative_to(self.directory).as_posix()
            for path in self.directory.rglob("*")
            if path.is_symlink() or not path.is_dir()
        )

    def why_no_file(self, name: str) -> str:
        path = self.directory / name
        if path.is_file():
            return ""
        return "is not a regular file" if path.exists() else "is missing"

    def open(self, name: str) -> BinaryIO:
        return (self.directory / name).open("rb")


class _StoredPlace(_Place):
    def __init__(self, store: ObjectStore) -> None:
        self.directory = ObjectPath(store.url)
        self._store = store

    def read_description(self) -> dict[str, Any]:
        try:
            content = json.loads(self._store.read(DESCRIPTION_FILE_NAME))
        except ValueError as error:
            raise InputError(f"description.json cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise InputError(
                f"description.json should be a JSON object, found {type(content).__name__}"
            )
        return content

    def names(self) -> list[str]:
        return [name for name in self._store.names() if name != CLAIM_FILE_NAME]

    def why_no_file(self, name: str) -> str:
        return "" if self._store.exists(name) else "is missing"

    def open(self, name: str) -> BinaryIO:
        return self._store.open(name)


def _read_description(place: _Place) -> dict[str, Any]:
    try:
        return place.read_description()
    except InputError as error:
        raise DatasetError(
            f"{place.directory} is not a dataset directory: {error}; prepare the dataset again, or copy it "
            "again from an intact copy"
        ) from error


def _cannot_be_opened(directory: Path) -> list[str]:
    try:
        open_dataset(directory)
    except DatasetError as error:
        return [str(error)]
    return []


def _stray_files(place: _Place, described: Mapping[str, Any]) -> Iterator[str]:
    names = place.names()
    stray = [name for name in names if name not in described and name != DESCRIPTION_FILE_NAME]
    for name in stray[:_MAX_STRAY_FILES]:
        yield f"{name}: unexpected file, not in the description"
    if len(stray) > _MAX_STRAY_FILES:
        yield f"{len(stray) - _MAX_STRAY_FILES:,} further unexpected files"


@dataclass(frozen=True)
class _FileFacts:
    size_bytes: int
    sha256: str


class _Described:
    """The valid part of a description; `problems` lists what is not valid."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        self.files: dict[str, _FileFacts] = {}
        self._description = description
        self._shards: dict[str, list[ShardCounts] | None] = {}

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> "_Described":
        """Check everything in the description that needs no other file."""
        described = cls(description)
        found = description.get("format_version")
        expected = SHARDED_FORMAT_VERSION if "shards" in description else FORMAT_VERSION
        if found != expected:
            described._say(
                f"format_version is {found!r}, expected {expected}: written by another release or "
                "another program"
            )
        described._check_vocabulary()
        described._check_lengths()
        for split in SPLITS:
            described._check_counts(split)
            described._check_shards(split)
        described._take_files()
        return described

    def count(self, name: str) -> int | None:
        """A positive integer of the description, or None if it is missing or not a possible size."""
        value = self._description.get(name)
        return value if type(value) is int and 0 < value < 1 << 62 else None

    def checks_of(self, name: str) -> ArrayCheck | None:
        """How to check the values of a file; None if it is not an array."""
        split, _, file_name = name.partition("/")
        if split not in SPLITS:
            return None
        num_tokens = self.count(f"number_of_{split}_tokens")
        num_samples = self.count(f"number_of_{split}_samples")
        file_name, shard = self._shard_of(split, file_name)
        if shard is not None:
            num_tokens, num_samples = shard.num_tokens, shard.num_samples
        if file_name == CORPUS_FILE_NAME:
            dtype = str(self._description.get("dtype"))
            return ArrayCheck(num_tokens, dtype, Ids(self.count("vocab_size")))
        if file_name == POSITIONS_FILE_NAME:
            least, most = self.count("min_sample_length"), self.count("max_sample_length")
            if self._has_answers:  # conversations are whole
                least = most = None
            return ArrayCheck(num_samples, POSITION_DTYPE.str, Positions(num_tokens, least, most))
        if file_name == LEARNED_FILE_NAME:
            learned = _found_in(self._description.get("counts"), split, "num_learned_tokens")
            is_known = (
                type(learned) is int and shard is None
            )  # the description has that of the split
            num_learned = int(str(learned)) if is_known else None
            return ArrayCheck(num_tokens, LEARNED_DTYPE.str, Marks(num_learned))
        return None

    def _shard_of(self, split: str, file_name: str) -> tuple[str, ShardCounts | None]:
        """The name of a file without the number of its shard, and what the shard holds."""
        found = _SHARD.fullmatch(file_name)
        shards = self._shards.get(split)
        if found is None or shards is None or int(found[2]) >= len(shards):
            return file_name, None
        return f"{found[1]}.npy", shards[int(found[2])]

    @property
    def _has_answers(self) -> bool:
        return bool(self._description.get("kind", "documents") != "documents")

    def _say(self, problem: str) -> None:
        self.problems.append(f"{DESCRIPTION_FILE_NAME}: {problem}")

    def _check_count(self, name: str) -> None:
        if self.count(name) is None:
            found = self._description.get(name)
            self._say(f"{name} should be a positive integer, found {found!r}")

    def _check_vocabulary(self) -> None:
        self._check_count("vocab_size")
        vocab_size = self.count("vocab_size")
        if vocab_size is None:
            return
        expected, found = token_dtype(vocab_size).str, self._description.get("dtype")
        if found != expected:
            self._say(f"dtype is {found!r}, but a vocab_size of {vocab_size:,} needs {expected!r}")
        special = self._description.get("special_token_ids")
        for role, token_id in special.items() if isinstance(special, dict) else ():
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                self._say(
                    f"special_token_ids: {role} is {token_id!r}, not below the vocab_size {vocab_size:,}"
                )

    def _check_lengths(self) -> None:
        for name in ("min_sample_length", "max_sample_length"):
            self._check_count(name)
        least, most = self.count("min_sample_length"), self.count("max_sample_length")
        if least is not None and most is not None and least > most:
            self._say(f"min_sample_length {least:,} is above max_sample_length {most:,}")

    def _check_counts(self, split: str) -> None:
        counts = self._description.get("counts")
        for unit in ("samples", "tokens"):
            name = f"number_of_{split}_{unit}"
            self._check_count(name)
            counted = _found_in(counts, split, f"num_{unit}")
            if counted is not None and counted != self._description.get(name):
                self._say(f"{name} is {self._description.get(name)!r}, but counts has {counted!r}")

    def _check_shards(self, split: str) -> None:
        try:
            self._shards[split] = described_shards(self._description, split)
        except DatasetError as error:
            self._say(str(error).removeprefix(f"{DESCRIPTION_FILE_NAME} "))

    def _expected_files(self, split: str) -> Sequence[str]:
        learned = (LEARNED_FILE_NAME,) if self._has_answers else ()
        file_names = (CORPUS_FILE_NAME, POSITIONS_FILE_NAME, *learned)
        shards = self._shards.get(split)
        if shards is None:
            return file_names if "shards" not in self._description else ()
        return [
            shard_file_name(file_name, index)
            for index in range(len(shards))
            for file_name in file_names
        ]

    def _take_files(self) -> None:
        files = self._description.get("output_files")
        if not isinstance(files, dict):
            self._say(f"output_files should name every file, found {type(files).__name__}")
            return
        for name, facts in files.items():
            size, sha256 = _found_in(facts, "size_bytes"), _found_in(facts, "sha256")
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts:
                self._say(f"output_files names {name!r}, which is outside of this directory")
            elif type(size) is not int or size < 0 or not _SHA256.fullmatch(str(sha256)):
                self._say(f"output_files should have size and SHA-256 of {name}, found {facts!r}")
            else:
                self.files[name] = _FileFacts(size, str(sha256))
        for split in SPLITS:
            for file_name in self._expected_files(split):
                if f"{split}/{file_name}" not in files:
                    self._say(f"output_files lacks {split}/{file_name}")


def _found_in(content: object, *keys: str) -> object:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _check_file(place: _Place, name: str, described: _Described) -> int:
    """Add the problems of a file to `described`; return how many bytes were read."""
    facts = described.files[name]
    problems: list[str] = []
    found_bytes = 0
    try:
        if why := place.why_no_file(name):
            problems.append(f"{why}: expected {facts.size_bytes:,} bytes")
        else:
            with place.open(name) as file:
                found_bytes = _read_file(file, name, described, problems)
    except OSError as error:
        problems.append(f"cannot be read: {error.strerror or error}")
    described.problems += [f"{name}: {problem}" for problem in problems]
    return found_bytes


def _read_file(file: BinaryIO, name: str, described: _Described, problems: list[str]) -> int:
    facts, check = described.files[name], described.checks_of(name)
    header_bytes = 0 if check is None else check.take_header(file)
    file.seek(0)
    digest = hashlib.sha256(file.read(header_bytes))
    found_bytes = file.tell()
    whole, sha256_at_expected_size = found_bytes <= facts.size_bytes, ""
    while block := file.read(_BLOCK_BYTES):
        expected_rest = facts.size_bytes - found_bytes
        if whole and len(block) > expected_rest:  # the trailing bytes start here
            before = digest.copy()
            before.update(memoryview(block)[:expected_rest])
            whole, sha256_at_expected_size = False, before.hexdigest()
        digest.update(block)
        found_bytes += len(block)
        if check is not None:
            check.feed(block)
    problems += _wrong_content(
        name, described.files, found_bytes, digest.hexdigest(), sha256_at_expected_size
    )
    if check is not None:
        problems += check.problems(found_bytes == facts.size_bytes)
    return found_bytes


def _wrong_content(
    name: str,
    files: Mapping[str, _FileFacts],
    found_bytes: int,
    sha256: str,
    sha256_at_expected_size: str,
) -> Iterator[str]:
    facts = files[name]
    if sha256 == facts.sha256 and found_bytes == facts.size_bytes:
        return
    others = [other for other, its in files.items() if its.sha256 == sha256 and other != name]
    if others:
        yield f"holds the content of {others[0]}: swapped?"
    elif found_bytes < facts.size_bytes:
        yield f"truncated: expected {facts.size_bytes:,} bytes, found {found_bytes:,}"
    elif found_bytes > facts.size_bytes:
        rest = "are as described" if sha256_at_expected_size == facts.sha256 else "differ too"
        yield (
            f"trailing bytes: expected {facts.size_bytes:,} bytes, found {found_bytes:,}; "
            f"the first {facts.size_bytes:,} {rest}"
        )
    else:
        yield (
            f"other content in the same {facts.size_bytes:,} bytes: SHA-256 {sha256}, expected "
            f"{facts.sha256}"
        )
