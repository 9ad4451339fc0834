"""Labelled rows of a data set that the package `datasets` loads: a name of the Hugging Face hub."""

from typing import Any

from full_stack_transformer.errors import MissingExtraError, RowError
from full_stack_transformer.rows.files import PLACE, Row
from full_stack_transformer.rows.splits import Split

_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "validation_matched"),
    "test": ("test", "test_matched"),
}


def hub_rows(name: str) -> dict[Split, list[Row]]:
    """The splits of `OWNER/NAME`, or `OWNER/NAME:CONFIGURATION`; classes by their names.

    Raises:
        MissingExtraError: the package is not installed.
        RowError: there is no such data set, or it needs a loading script.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{name!r} is no directory here; to load it from the Hugging Face hub install the package "
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
    for split, names in _SPLIT_NAMES.items():
        for one in names:
            if one in found:
                splits[split] = _rows(found[one], f"{name} {one}")
                break
    if "train" not in splits:
        raise RowError(f"the data set {name!r} has no split train; found {', '.join(found)}")
    return splits


def _rows(part: Any, place: str) -> list[Row]:
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
    rows = []
    for number, row in enumerate(part):
        named = dict(row)
        for key, names in names_of_classes.items():
            if named[key] is not None and named[key] >= 0:
                named[key] = names[named[key]]
        for key, names in names_of_lists.items():
            ids = named[key]
            # As of one class, -1 is what rows of a test split say; Python takes it for the last name.
            is_labelled = ids is not None and all(one >= 0 for one in ids)
            named[key] = [names[one] for one in ids] if is_labelled else None
        rows.append({**named, PLACE: f"{place}, row {number}"})
    return rows
