"""Rows as train, valid and test: from a directory, from the Hugging Face hub, or split by a hash."""

import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from full_stack_transformer.documents.blocks import ending
from full_stack_transformer.errors import MissingExtraError, RowError
from full_stack_transformer.rows.fields import PLACE, Row, all_but_labels
from full_stack_transformer.rows.files import ROW_ENDINGS, class_folders
from full_stack_transformer.storage import file_facts, files_below

logger = logging.getLogger(__name__)

Texts = Callable[[Row], Mapping[str, Any]]
"""The fields of a row that its task reads and that are no label: what makes two rows equal."""

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


def find_splits(directory: Path) -> dict[Split, Path]:
    """The files train.*, valid.* (or validation, dev) and test.* of a directory, or folders of these names.

    Raises:
        RowError: there is no training file.
    """
    found: dict[Split, Path] = {}
    inside = sorted(directory.iterdir())
    for split, stems in _NAMES.items():
        paths = [path for path in inside if _is_split(path, stems)]
        if len(paths) > 1:
            several = ", ".join(path.name for path in paths)
            logger.warning("%s: %s rows are in %s; reading the first", directory, split, several)
        if paths:
            found[split] = paths[0]
    if "train" not in found:
        names = [path.name for path in inside]
        are_labels = any(list(folder.glob("*.txt")) for folder in inside if folder.is_dir())
        raise RowError(
            f"{directory} should have a file train with one of the endings {', '.join(ROW_ENDINGS)}, or a "
            f"folder train; found {', '.join(names[:8]) or 'nothing'}"
            + ("; if its folders are labels, pass it as --train_file" if are_labels else "")
        )
    return found


def has_training_rows(directory: Path, *, as_file: bool = False) -> bool:
    """Whether a directory holds training rows, in a file or, unless `as_file`, a folder."""
    return directory.is_dir() and any(
        _is_split(path, _NAMES["train"]) and not (as_file and path.is_dir())
        for path in directory.iterdir()
    )


def _is_split(path: Path, stems: Sequence[str]) -> bool:
    is_rows = path.is_dir() or ending(path).lower() in ROW_ENDINGS
    return is_rows and path.name.split(".")[0].lower() in stems


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


def split_by_hash(
    rows: Iterable[Row],
    parts: Sequence[float],
    *,
    texts: Texts = all_but_labels,
    seed: int = 0,
) -> list[list[Row]]:
    """The rows in as many lists as `parts`, each with about that fraction of them.

    The list of a row depends only on its texts (or its group) and the seed: equal rows stay together, and
    adding or removing rows does not move others. Texts are equal if they differ in white space and the
    Unicode form of accents only; such rows go where the one with the lowest hash belongs.
    """
    all_rows = list(rows)
    total, borders = 0.0, []
    for part in parts:
        total += part
        borders.append(total)
    keys = [_key(row, texts) for row in all_rows]
    common = list(map(_canonical, keys))
    hashes: dict[str, int] = {}
    for key, shared in zip(keys, common, strict=True):
        value = _hash(key, seed)
        hashes[shared] = min(value, hashes.get(shared, value))
    lists: list[list[Row]] = [[] for _ in parts]
    for row, shared in zip(all_rows, common, strict=True):
        share = hashes[shared] / _HASH_RANGE * total
        index = next(i for i, border in enumerate(borders) if share < border or i + 1 == len(parts))
        lists[index].append(row)
    return lists


def num_repeated(
    known: Iterable[Row], *others: Iterable[Row], texts: Texts = all_but_labels
) -> list[int]:
    """The number of rows of each of the others that have the texts, or the group, of a known row."""
    keys = {_canonical(_key(row, texts)) for row in known}
    return [sum(_canonical(_key(row, texts)) in keys for row in rows) for rows in others]


def describe_rows(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file or folder of rows, for a description; hidden files are no rows."""
    if path.is_file():
        return {"name": path.name, **file_facts(path)}
    digest = hashlib.sha256()
    linked = [folder for folder in class_folders(path) if folder.is_symlink()]
    below = [*files_below(path), *(file for folder in linked for file in files_below(folder))]
    files = sorted(
        file
        for file in below
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    for file in files:
        facts = file_facts(file)
        digest.update(f"{file.relative_to(path)} {facts['sha256']}\n".encode())
    return {"name": path.name, "number_of_files": len(files), "sha256": digest.hexdigest()}


def _key(row: Row, texts: Texts) -> Any:
    key = row.get(GROUP_FIELD)
    return texts(row) if key is None else key


def _hash(key: Any, seed: int) -> int:
    text = json.dumps([seed, key], ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _canonical(key: Any) -> str:
    """The same for keys that differ in white space, the form of accents and the names of fields only."""
    if isinstance(key, Mapping):
        key = [value for value in key.values() if value is not None]
    return json.dumps(_normalized(key), ensure_ascii=False, sort_keys=True, default=str)


def _normalized(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, Mapping):
        return {name: _normalized(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_normalized, value))
    return value


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
