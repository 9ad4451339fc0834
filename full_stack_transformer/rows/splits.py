"""Rows as train, valid and test: from a directory, from the Hugging Face hub, or split by a hash."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from full_stack_transformer.documents.blocks import ending
from full_stack_transformer.errors import MissingExtraError, RowError
from full_stack_transformer.rows.fields import LABEL_NAMES
from full_stack_transformer.rows.files import PLACE, ROW_ENDINGS, Row
from full_stack_transformer.storage import file_facts, files_below

Split = Literal["train", "valid", "test"]

SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "dev", "val"),
    "test": ("test",),
}
_HUB_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "validation_matched"),
    "test": ("test", "test_matched"),
}
_HASH_RANGE = 1 << 64
# Rows with the same value of this field stay together.
GROUP_FIELD = "group"
# Fields that may differ between rows of the same texts: ids and labels.
_NO_TEXTS = LABEL_NAMES | {PLACE, "", "id", "idx", "index", "guid"}


def find_splits(directory: Path) -> dict[Split, Path]:
    """The files train.*, valid.* (or validation, dev) and test.* of a directory, or folders of these names.

    Raises:
        RowError: there is no training file.
    """
    found: dict[Split, Path] = {}
    for split, stems in _NAMES.items():
        for path in sorted(directory.iterdir()):
            is_rows = path.is_dir() or ending(path) in ROW_ENDINGS
            if path.name.split(".")[0] in stems and is_rows:
                found.setdefault(split, path)
    if "train" not in found:
        names = sorted(path.name for path in directory.iterdir())
        raise RowError(
            f"{directory} should have a file train with one of the endings {', '.join(ROW_ENDINGS)}, or a "
            f"folder train; found {', '.join(names[:8]) or 'nothing'}"
        )
    return found


def hub_rows(name: str) -> dict[Split, list[Row]]:
    """The splits of a data set of the Hugging Face hub, by the package `datasets`; classes by their names.

    Args:
        name: `OWNER/NAME`, or `OWNER/NAME:CONFIGURATION`.

    Raises:
        MissingExtraError: the package is not installed.
        RowError: the data set does not exist, or needs a loading script.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{name!r} is not a directory; to load it from the Hugging Face hub install the package "
            "datasets: pip install datasets"
        ) from error
    path, _, configuration = name.partition(":")
    try:
        found: Any = load_dataset(path, configuration or None)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise RowError(f"the data set {name!r} cannot be loaded: {error}") from error
        raise RowError(
            f"the data set {name!r} is a loading script, which the package datasets no longer runs since "
            "version 4; take its Parquet files (hf download --repo-type dataset "
            f"--revision refs/convert/parquet {path}) and pass them as --train_file, or instantiate its "
            "builder class in a BaseDataModule of your own"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise RowError(f"the data set {name!r} cannot be loaded: {error}") from error
    splits: dict[Split, list[Row]] = {}
    for split, names in _HUB_NAMES.items():
        for hub_name in names:
            if hub_name in found:
                splits[split] = _hub_rows(found[hub_name], f"{name} {hub_name}")
                break
    if "train" not in splits:
        raise RowError(f"the data set {name!r} has no split train; found {', '.join(found)}")
    return splits


def split_by_hash(rows: Iterable[Row], parts: Sequence[float], *, seed: int = 0) -> list[list[Row]]:
    """The rows in as many lists as `parts`, each with about that fraction of them.

    The list of a row depends only on its texts (or its group) and the seed: equal rows stay together, and
    adding or removing rows does not move others.
    """
    total, borders = 0.0, []
    for part in parts:
        total += part
        borders.append(total)
    lists: list[list[Row]] = [[] for _ in parts]
    for row in rows:
        value = _hash(row, seed) / _HASH_RANGE * total
        index = next(i for i, border in enumerate(borders) if value < border or i + 1 == len(parts))
        lists[index].append(row)
    return lists


def num_repeated(known: Iterable[Row], *others: Iterable[Row]) -> list[int]:
    """The number of rows of each of the others that have the texts, or the group, of a known row."""
    hashes = {_hash(row, 0) for row in known}
    return [sum(_hash(row, 0) in hashes for row in rows) for rows in others]


def describe_rows(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file or folder of rows, for a description."""
    if path.is_file():
        return {"name": path.name, **file_facts(path)}
    digest = hashlib.sha256()
    files = files_below(path)
    for file in files:
        facts = file_facts(file)
        digest.update(f"{file.relative_to(path)} {facts['sha256']}\n".encode())
    return {"name": path.name, "number_of_files": len(files), "sha256": digest.hexdigest()}


def _hash(row: Row, seed: int) -> int:
    key = row.get(GROUP_FIELD)
    if key is None:
        key = {name: value for name, value in row.items() if name not in _NO_TEXTS}
    text = json.dumps([seed, key], ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _hub_rows(part: Any, place: str) -> list[Row]:
    names_of_classes = {
        key: feature.names
        for key, feature in part.features.items()
        if getattr(feature, "names", None)
    }
    # A list of classes, such as the labels of words.
    names_of_lists = {
        key: feature.feature.names
        for key, feature in part.features.items()
        if getattr(getattr(feature, "feature", None), "names", None)
    }
    rows: list[Row] = []
    for index, row in enumerate(part):
        named = dict(row)
        for key, names in names_of_classes.items():
            if named[key] is not None and named[key] >= 0:
                named[key] = names[named[key]]
        for key, names in names_of_lists.items():
            ids = named[key]
            # -1 means unknown, as for a single class; in Python it would be the last name.
            is_labelled = ids is not None and all(class_id >= 0 for class_id in ids)
            named[key] = [names[class_id] for class_id in ids] if is_labelled else None
        rows.append({**named, PLACE: f"{place}, row {index}"})
    return rows
