"""Opening a dataset directory: its description, tokenizer and two corpora."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.errors import DatasetError, InputError
from full_stack_transformer.storage import DESCRIPTION_FILE_NAME, read_json, versions

FORMAT_VERSION = 1


@dataclass(frozen=True)
class DatasetDirectory:
    """A complete dataset directory; `train` and `valid` are memory-mapped."""

    directory: Path
    description: dict[str, Any]
    train: Corpus
    valid: Corpus

    @property
    def data_place(self) -> str:
        """Where it is, for messages."""
        return str(self.directory)

    @property
    def tokenizer_directory(self) -> Path:
        """What `open_saved_tokenizer` and `AutoTokenizer` open."""
        return self.directory / "tokenizer"


def open_dataset(path: Path) -> DatasetDirectory:
    """Open DATASETS_ROOT/NAME/VERSION, or the newest version of DATASETS_ROOT/NAME.

    Raises:
        DatasetError: there is no complete dataset directory, or it is damaged.
    """
    directory = path
    if path.is_dir() and not (path / DESCRIPTION_FILE_NAME).is_file():
        numbered = versions(path.parent, path.name)
        directory = numbered[-1] if numbered else path
    try:
        description = read_json(directory / DESCRIPTION_FILE_NAME)
    except InputError as error:
        raise DatasetError(
            f"{path} is not a dataset directory: {error}; make one with fst prepare_dataset"
        ) from error
    if description.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{directory} has format version {description.get('format_version')!r}, expected "
            f"{FORMAT_VERSION}; prepare the dataset again"
        )
    train, valid = (
        Corpus(
            directory / split,
            num_samples=description[f"number_of_{split}_samples"],
            num_tokens=description[f"number_of_{split}_tokens"],
        )
        for split in ("train", "valid")
    )
    return DatasetDirectory(directory, description, train, valid)
