"""A model directory with a chat template."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def chatting_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a chat template."""
    directory = tmp_path_factory.mktemp("models") / "chatting"
    shutil.copytree(model_dir, directory)
    template = "{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template + "{{ bos_token }}")
    return directory
