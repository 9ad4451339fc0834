"""`fst evaluate` on a dataset in object storage prints what it prints of the same files on a disk."""

from pathlib import Path

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.evaluation.run import measured
from full_stack_transformer.first_checks import check_first
from tests.datasets.test_stored import URL, upload
from tests.object_store import S3Server


def test_the_metrics_are_those_of_the_disk(
    dataset: DatasetDirectory, model_dir: Path, s3: S3Server, tmp_path: Path
) -> None:
    upload(dataset.directory, f"{URL}/0")
    stored = EvaluateArguments(model_dir, Path(URL), data_cache=tmp_path, data_cache_bytes="5MB")
    check_first(stored)
    assert measured(stored) == measured(EvaluateArguments(model_dir, dataset.directory))
