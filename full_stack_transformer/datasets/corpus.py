"""A dataset directory and its corpora: all tokens of all samples in one array, and where each sample starts.

    train/corpus.npy                  (tokens,)   uint16 where the vocabulary fits, else uint32
    train/sample_start_positions.npy  (samples,)  int64; sample i ends where sample i + 1 starts
    train/learned.npy                 (tokens,)   uint8, of conversations: 1 where the token is an answer's

Little-endian, in NumPy's own file format. Reading is memory-mapped: a corpus may be larger than memory.
`shards` describes the other form, of several such files. Knows nothing of text.
"""

import copy
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from full_stack_transformer.arguments.data import DataCacheOptions
from full_stack_transformer.datasets.files import (
    TOKENIZER_DIRECTORY_NAME,
    DatasetFiles,
    FilesOnDisk,
    OpenedArray,
    StoredDataset,
    StoredFiles,
    find_stored,
)
from full_stack_transformer.datasets.order import SHARDS_TOGETHER, ShardLayout
from full_stack_transformer.datasets.shards import (
    JoinedArray,
    ShardCounts,
    borders_of,
    close_all,
    described_shards,
    shard_file_name,
)
from full_stack_transformer.errors import DatasetError, InputError, UsageError
from full_stack_transformer.object_storage import is_url
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME, read_json, versions

FORMAT_VERSION = 1
# Of datasets in shards: releases that do not know them refuse the number.
SHARDED_FORMAT_VERSION = 2
CORPUS_FILE_NAME = "corpus.npy"
POSITIONS_FILE_NAME = "sample_start_positions.npy"
LEARNED_FILE_NAME = "learned.npy"
POSITION_DTYPE = np.dtype("<i8")
LEARNED_DTYPE = np.dtype("|u1")

SPLITS = ("train", "valid")

Kind = Literal["documents", "conversations", "preferences"]
KINDS: tuple[Kind, ...] = ("documents", "conversations", "preferences")


def token_dtype(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The smallest type that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def shorter_than_journal(path: Path) -> DatasetError:
    """The error for a file of an interrupted run that lost its end, as in a power cut."""
    return DatasetError(
        f"{path.name} of the interrupted run is shorter than its journal says; its files were "
        "removed, run the command again"
    )


class ArrayFile:
    """A one-dimensional .npy file that grows by appending; its header is completed at the end.

    Written through a plain handle: np.save loses the last bytes on a full disk without an exception,
    and a memory map dies there with SIGBUS.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.generic]) -> None:
        self.length = 0
        self._path = path
        self._dtype = dtype
        # An existing file is continued: the caller cuts it to the length that it knows.
        self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b")
        self._write_header()
        self._header_bytes = self._file.tell()
        self._file.seek(0, os.SEEK_END)

    def append(self, values: NDArray[np.generic]) -> None:
        """Append `values` (n,), which must fit the type."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.length += len(values)

    def cut(self, length: int) -> None:
        """Remove what was appended after the first `length` values.

        Raises:
            DatasetError: there are fewer; cutting would fill the rest with zeros.
        """
        num_bytes = os.fstat(self._file.fileno()).st_size - self._header_bytes
        if length > max(self.length, num_bytes // self._dtype.itemsize):
            raise shorter_than_journal(self._path)
        self._file.seek(self._header_bytes + length * self._dtype.itemsize)
        self._file.truncate()
        self.length = length

    def flush(self) -> None:
        """Make what was appended durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Complete the header and flush everything to the disk."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes, "the header must not grow"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without completing the file."""
        self._file.close()

    def _write_header(self) -> None:
        # NumPy pads a header to 64 bytes, with room for the length to grow.
        header = {
            "descr": npy_format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        npy_format.write_array_header_1_0(self._file, header)


class CorpusWriter:
    """Appends samples to the files of a corpus; complete after the `with`.

    Existing files are continued after the given lengths.

    Args:
        directory: of the split.
        vocab_size: decides the type of the ids.
        num_tokens: that are there already.
        num_samples: that are there already.
        has_answers: whether it is said of each token if it is learned.
        shard: number of the shard; None in the single form.
    """

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        *,
        num_tokens: int = 0,
        num_samples: int = 0,
        has_answers: bool = False,
        shard: int | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        corpus, positions, learned = (
            directory / (file_name if shard is None else shard_file_name(file_name, shard))
            for file_name in (CORPUS_FILE_NAME, POSITIONS_FILE_NAME, LEARNED_FILE_NAME)
        )
        self._corpus = ArrayFile(corpus, token_dtype(vocab_size))
        self._positions = ArrayFile(positions, POSITION_DTYPE)
        self._learned = ArrayFile(learned, LEARNED_DTYPE) if has_answers else None
        self.cut(num_tokens=num_tokens, num_samples=num_samples)

    @property
    def num_samples(self) -> int:
        """Samples so far."""
        return self._positions.length

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self._corpus.length

    def append(
        self,
        token_ids: NDArray[np.generic],
        lengths: NDArray[np.int64],
        learned: NDArray[np.generic] | None = None,
    ) -> None:
        """Append samples.

        Args:
            token_ids: (tokens,) of all samples, concatenated.
            lengths: (samples,) tokens of each.
            learned: (tokens,) whether each is an answer's, in a corpus that has answers.
        """
        assert len(token_ids) == lengths.sum(), "the lengths must add up to the tokens"
        assert (learned is None) == (self._learned is None), "all tokens are marked, or none"
        if self._learned is not None and learned is not None:
            assert len(learned) == len(token_ids), "each token is marked"
            self._learned.append(learned)
        self._positions.append(self._corpus.length + np.cumsum(lengths) - lengths)
        self._corpus.append(token_ids)

    def cut(self, *, num_tokens: int, num_samples: int) -> None:
        """Remove everything after the first samples."""
        self._corpus.cut(num_tokens)
        self._positions.cut(num_samples)
        if self._learned is not None:
            self._learned.cut(num_tokens)

    def flush(self) -> None:
        """Make what was appended durable."""
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Complete the files."""
        for file in self._files:
            file.close()

    def abandon(self) -> None:
        """Close the files without completing them."""
        for file in self._files:
            file.abandon()

    @property
    def _files(self) -> list[ArrayFile]:
        files = (self._corpus, self._positions, self._learned)
        return [file for file in files if file is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close() if exception_type is None else self.abandon()


class Corpus:
    """Samples of one split of a dataset directory, memory-mapped; `of_shards` opens the other form.

    Raises:
        DatasetError: a file is missing or damaged, or its size differs from the description.
    """

    def __init__(
        self,
        directory: Path,
        *,
        num_samples: int,
        num_tokens: int,
        has_answers: bool = False,
        files: DatasetFiles | None = None,
    ) -> None:
        self.directory = directory
        self._num_ids = 1 << 32
        opener = files or FilesOnDisk(directory.parent)

        def opened(file_name: str, length: int, *dtypes: str) -> Any:
            # Plain arrays over the maps: np.memmap adds a microsecond to each indexing.
            return np.asarray(opener.open(f"{directory.name}/{file_name}", length, dtypes).values)

        self.tokens: NDArray[np.integer] = opened(CORPUS_FILE_NAME, num_tokens, "<u2", "<u4")
        self.start_positions: NDArray[np.int64] = opened(POSITIONS_FILE_NAME, num_samples, "<i8")
        self.learned: NDArray[np.integer] | None = None
        if has_answers:
            self.learned = opened(LEARNED_FILE_NAME, num_tokens, LEARNED_DTYPE.str)

    layout: ShardLayout | None = None
    """Which samples are in which shard; None in the single form."""
    _token_borders: NDArray[np.int64]
    """(shards + 1,) where each shard begins in the corpus."""

    @classmethod
    def of_shards(
        cls,
        directory: Path,
        shards: Sequence[ShardCounts],
        *,
        dtype: np.dtype[Any],
        has_answers: bool,
        files: DatasetFiles,
    ) -> Self:
        """The samples of all shards of a split; the arrays are opened when they are read."""
        corpus = cls.__new__(cls)
        corpus.directory, corpus._num_ids = directory, 1 << 32
        token_borders = borders_of([shard.num_tokens for shard in shards])
        sample_borders = borders_of([shard.num_samples for shard in shards])

        def joined(
            file_name: str, borders: NDArray[np.int64], dtype: np.dtype[Any], offsets: Any = None
        ) -> Any:
            def open_array(index: int) -> OpenedArray:
                name = f"{directory.name}/{shard_file_name(file_name, index)}"
                return files.open(name, int(np.diff(borders)[index]), (dtype.str,))

            return JoinedArray(borders, dtype, open_array, offsets)

        corpus.tokens = joined(CORPUS_FILE_NAME, token_borders, dtype)
        corpus.start_positions = joined(
            POSITIONS_FILE_NAME, sample_borders, POSITION_DTYPE, token_borders[:-1]
        )
        corpus.learned = (
            joined(LEARNED_FILE_NAME, token_borders, LEARNED_DTYPE) if has_answers else None
        )
        corpus._token_borders = token_borders
        file_names = (CORPUS_FILE_NAME, POSITIONS_FILE_NAME, *([LEARNED_FILE_NAME] * has_answers))

        def fetch_ahead(indices: Sequence[int]) -> None:
            files.fetch_ahead(
                [
                    f"{directory.name}/{shard_file_name(file_name, index)}"
                    for index in indices
                    for file_name in file_names
                ]
            )

        corpus.layout = ShardLayout(sample_borders, fetch_ahead)
        return corpus

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.start_positions)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Token ids (tokens,) of sample `index`."""
        return self.gather([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[NDArray[np.int64]]:
        """Token ids (tokens,) of several samples; torch's DataLoader calls this once per batch."""
        return self.gather(indices)

    def gather(self, indices: Sequence[int]) -> list[NDArray[np.int64]]:
        """Token ids (tokens,) of several samples, copied out of the memory map."""
        starts, lengths = self.spans(np.asarray(indices, dtype=np.int64))
        ends = np.cumsum(lengths)
        positions = np.arange(lengths.sum()) + np.repeat(starts - (ends - lengths), lengths)
        return np.split(self.take(positions), ends[:-1]) if len(ends) else []

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens (n,) at positions of the corpus, copied; positions after its end give the last token."""
        return self._checked(self.tokens.take(positions, mode="clip"))

    def ignored(self, positions: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Where nothing is to be predicted, at positions of the corpus; None if each token is predicted."""
        return None if self.learned is None else self.learned.take(positions, mode="clip") == 0

    def learning_all(self) -> Self:
        """The same corpus, of which every token is learned."""
        changed = copy.copy(self)
        changed.learned = None
        return changed

    def windows(self, starts: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """The tokens (n, width) from each start on, copied, across the borders of samples.

        One indexing of a view whose rows overlap: 7 us for 16 rows of 41 tokens, 12 us for a loop over
        the rows, 9 us for one index per token.
        """
        if self.layout is not None:
            return self.take(starts[:, None] + np.arange(width))
        num_windows = len(self.tokens) - width + 1
        if num_windows <= int(starts.max()):
            return self.take(starts[:, None] + np.arange(width))
        step = self.tokens.itemsize
        view: NDArray[np.integer] = np.ndarray(
            (num_windows, width), self.tokens.dtype, self.tokens.data, 0, (step, step)
        )
        return self._checked(view[starts])

    def limit_ids(self, num_ids: int) -> None:
        """Refuse ids from `num_ids` on, wherever tokens are read; a model would fail on them."""
        self._num_ids = num_ids

    def _checked(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """The ids as int64.

        Looks at each batch as it is read, 2 us for 16 rows of 41 tokens: a whole corpus can be larger than
        memory.

        Raises:
            DatasetError: one is not below the limit.
        """
        if ids.size and int(ids.max()) >= self._num_ids:
            raise DatasetError(
                f"{self.directory / CORPUS_FILE_NAME} holds the token id {int(ids.max()):,}, but the "
                f"tokenizer has {self._num_ids:,} tokens; prepare the dataset again, or copy it again "
                f"from an intact copy (fst verify_dataset {self.directory.parent} shows what differs)"
            )
        return ids.astype(np.int64)

    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of every sample (samples,)."""
        return np.diff(self.start_positions, append=len(self.tokens))

    def spans(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start in the corpus and number of tokens of each of the samples (n,)."""
        starts = self.start_positions.take(indices)
        following = indices + 1
        if self.layout is not None:
            return starts, self._ends_in_shards(following) - starts
        ends = self.start_positions.take(following, mode="clip")
        ends[following == len(self)] = len(self.tokens)
        return starts, ends - starts

    def _ends_in_shards(self, following: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the samples before these end: at the end of its shard, nothing of the next is read."""
        assert self.layout is not None, "a corpus in shards"
        shard = np.searchsorted(self.layout.borders, following)
        is_last = self.layout.borders[shard] == following
        ends = np.empty_like(following)
        ends[is_last] = self._token_borders[shard[is_last]]
        ends[~is_last] = self.start_positions.take(following[~is_last])
        return ends

    def samples_at(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples (n,) that start at these positions of the corpus."""
        if self.layout is None:
            return np.searchsorted(self.start_positions, starts)
        found = np.empty_like(starts)
        shards = np.searchsorted(self._token_borders, starts, side="right") - 1
        for shard in np.unique(shards).tolist():
            first, end = self.layout.borders[shard : shard + 2].tolist()
            here = shards == shard
            found[here] = first + np.searchsorted(self.start_positions[first:end], starts[here])
        return found

    def layout_of_pieces(self, row_length: int) -> ShardLayout | None:
        """The shards of pieces of one length, which are cut across the borders of samples."""
        if self.layout is None:
            return None
        borders = -(-self._token_borders // row_length)
        borders[-1] = self.num_tokens // row_length
        return self.layout.with_borders(np.minimum(borders, borders[-1]))

    def without_first(self, token_id: int) -> Self:
        """A copy in memory whose samples do not begin with this token."""
        if self.layout is not None:
            plain = copy.copy(self)
            plain.layout, plain.learned = None, None
            plain.tokens = np.asarray(self.tokens)
            plain.start_positions = np.asarray(self.start_positions)
            return plain.without_first(token_id)
        firsts = self.start_positions[self.tokens[self.start_positions] == token_id]
        changed = copy.copy(self)
        changed.tokens = np.delete(self.tokens, firsts)
        starts = self.start_positions - np.searchsorted(firsts, self.start_positions)
        # A sample of this token alone is gone.
        changed.start_positions = starts[np.diff(starts, append=len(changed.tokens)) > 0]
        return changed

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Predicted tokens of each of the samples: all but the first."""
        return lengths - 1


@dataclass(frozen=True)
class DatasetDirectory:
    """A complete dataset directory; `train` and `valid` are memory-mapped."""

    directory: Path
    description: dict[str, Any]
    train: Corpus
    valid: Corpus
    local_tokenizer: Path | None = None
    """Where the tokenizer of a dataset in object storage is."""

    @property
    def kind(self) -> Kind:
        """What its samples are."""
        kind: Kind = self.description.get("kind", "documents")
        return kind

    @property
    def data_place(self) -> str:
        """Where it is, for messages."""
        return str(self.directory)

    @property
    def tokenizer_directory(self) -> Path:
        """What `open_saved_tokenizer` and `AutoTokenizer` open."""
        return self.local_tokenizer or self.directory / TOKENIZER_DIRECTORY_NAME


def prepare_command(dataset: DatasetDirectory, tokenizer_path: str) -> str:
    """The command that prepares the same documents with another tokenizer; places of files are not known."""
    described = dataset.description
    words = ["fst", "prepare_dataset", "--tokenizer_path", tokenizer_path]
    for name in ("documents_train_file", "documents_valid_file", "conversations", "preferences"):
        for file in described.get(name) or ():
            words += [f"--{name}", str(file)]
    if described.get("validation_fraction"):
        words += ["--validation_fraction", str(described["validation_fraction"])]
    words += ["--max_sample_length", str(described["max_sample_length"])]
    return shlex.join([*words, "--dataset_name", str(described.get("dataset_name", "NAME"))])


def refuse_model(directory: Path) -> None:
    """Tell a model directory, or an experiment, from a dataset directory.

    Raises:
        DatasetError: it is one.
    """
    for model in (directory, directory / "model"):
        if (model / "config.json").is_file() and not (directory / "train").is_dir():
            raise DatasetError(
                f"{model} is a model directory, not a dataset directory; make one with the tokenizer of this "
                f"model: fst prepare_dataset --tokenizer_path {model} --documents_train_file FILE "
                "--validation_fraction 0.1 --dataset_name NAME"
            )


def open_dataset(path: Path, options: DataCacheOptions | None = None) -> DatasetDirectory:
    """Open DATASETS_ROOT/NAME/VERSION, or the newest version of DATASETS_ROOT/NAME, on a disk or at a URL.

    Args:
        path: of the dataset.
        options: where copies of files in object storage are kept.

    Raises:
        DatasetError: there is no complete dataset directory, or it is damaged.
        MachineError: the object store does not answer, or the cache is too small.
    """
    if is_url(path):
        return _open_stored(find_stored(path, options))
    directory = path
    if path.is_dir() and not (path / DESCRIPTION_FILE_NAME).is_file():
        numbered = versions(path.parent, path.name)
        directory = numbered[-1] if numbered else path
    refuse_model(directory)
    try:
        description = read_json(directory / DESCRIPTION_FILE_NAME)
    except InputError as error:
        raise DatasetError(
            f"{path} is not a dataset directory: {error}; make one with fst prepare_dataset"
        ) from error
    check_format(description, directory)
    train, valid = (open_split(directory, description, split) for split in SPLITS)
    return DatasetDirectory(directory, description, train, valid)


def check_format(description: Mapping[str, Any], directory: Path) -> None:
    """Refuse a description of another format.

    Raises:
        DatasetError: it is.
    """
    expected = SHARDED_FORMAT_VERSION if "shards" in description else FORMAT_VERSION
    if description.get("format_version") != expected:
        raise DatasetError(
            f"{directory} has format version {description.get('format_version')!r}, expected "
            f"{expected}; prepare the dataset again"
        )
    kind = description.get("kind", "documents")
    if kind not in KINDS:
        raise DatasetError(
            f"{directory} holds {kind!r}, which this release does not know ({', '.join(KINDS)}); prepare "
            "the dataset again"
        )


def _open_stored(stored: StoredDataset) -> DatasetDirectory:
    check_format(stored.description, stored.directory)
    _check_cache(stored)
    facts = stored.description["output_files"]
    files = StoredFiles(stored.store, stored.cache, facts, close_all)
    train, valid = (
        open_split(stored.directory, stored.description, split, files) for split in SPLITS
    )
    return DatasetDirectory(
        stored.directory, stored.description, train, valid, stored.tokenizer_directory
    )


def _check_cache(stored: StoredDataset) -> None:
    """Refuse a cache in which the shards of two windows of samples have no room.

    Raises:
        UsageError: it is too small: each batch would fetch shards again.
    """
    sizes: dict[str, int] = {}
    for name, facts in stored.description["output_files"].items():
        number = name.rpartition("-")[2] if name.startswith("train/") else ""
        sizes[number] = sizes.get(number, 0) + int(facts["size_bytes"])
    sizes.pop("")
    needed = sum(sorted(sizes.values())[-2 * SHARDS_TOGETHER :])
    if needed > stored.cache.max_bytes:
        raise UsageError(
            f"--data_cache_bytes must be at least {needed:,} for {stored.directory}, found "
            f"{stored.cache.max_bytes:,}: samples of {SHARDS_TOGETHER} shards are mixed, and as many are "
            "fetched ahead; raise it, or prepare the dataset with a smaller --max_shard_bytes"
        )


def open_split(
    directory: Path, description: Mapping[str, Any], split: str, files: DatasetFiles | None = None
) -> Corpus:
    """The samples of a split, in either form.

    Args:
        directory: of the dataset.
        description: of the dataset.
        split: train or valid.
        files: of a dataset in shards; by default those of the directory.

    Raises:
        DatasetError: a file is missing or damaged, or differs from the description.
    """
    has_answers = description.get("kind", "documents") != "documents"
    try:
        shards = described_shards(description, split)
    except DatasetError as error:
        raise DatasetError(f"{directory}: {error}; prepare the dataset again") from error
    if shards is None:
        return Corpus(
            directory / split,
            num_samples=description[f"number_of_{split}_samples"],
            num_tokens=description[f"number_of_{split}_tokens"],
            has_answers=has_answers,
            files=files,
        )
    return Corpus.of_shards(
        directory / split,
        shards,
        dtype=token_dtype(description["vocab_size"]),
        has_answers=has_answers,
        files=files or FilesOnDisk(directory),
    )
