"""A tokenizer for the rows of small_tasks.py."""

from pathlib import Path

import pytest

from tests.tasks.small_tasks import small_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 300 tokens, for 48 at once."""
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
