"""The wheel in an environment of its own, outside the checkout and without a C++ compiler.

The default suite puts the libraries that are already built into the wheel. The long tier compiles them, and
goes through training and the service too: pytest -m slow tests/test_wheel.py
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from full_stack_transformer import machine
from full_stack_transformer.generation.runners.native import library
from tests.logged_process import LoggedProcess

ROOT = Path(__file__).resolve().parents[1]
# A compiler that takes what the installation of this checkout has built.
_COPYING_COMPILER = """#!/bin/sh
for last; do true; done
exec head -c -32 "{folder}/$(basename "$last")" > "$last"
"""

Fst = Callable[..., "subprocess.CompletedProcess[str]"]


def _build_wheel(folder: Path, environment: dict[str, str]) -> Path:
    pytest.importorskip("setuptools", "77", reason="NOT BUILT: a wheel needs setuptools 77")
    unwanted = shutil.ignore_patterns("__pycache__", "*.py[co]", "*.so")
    source = folder / "source"
    shutil.copytree(
        ROOT / "full_stack_transformer", source / "full_stack_transformer", ignore=unwanted
    )
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run(
        [*pip, "--wheel-dir", folder, source],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=300,
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _install(wheel: Path, folder: Path) -> dict[str, str]:
    """Environment of a process that finds the wheel and its dependencies; no checkout, no compiler."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    packages.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    zipfile.ZipFile(wheel).extractall(packages)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **kept,
        "PATH": str(folder / "bin"),
        "CXX": "/none",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module", params=["built", pytest.param("compiled", marks=pytest.mark.slow)])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The environment of an installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    compiler = folder / "c++"
    environment = {}
    if request.param == "built":
        if not (library._PREBUILT / library.file_name("plain")).is_file():
            pytest.skip("NOT BUILT: the package was installed without a C++ compiler")
        compiler.write_text(_COPYING_COMPILER.format(folder=library._PREBUILT))
        compiler.chmod(0o755)
        environment = {"CXX": str(compiler)}
    wheel = _build_wheel(folder, environment)
    names = zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("any.whl")
    found = {Path(name).name for name in names if name.endswith(".so")}
    assert found == {library.file_name(isa) for isa in library.targets()}
    assert "full_stack_transformer/py.typed" in names
    return _install(wheel, folder / "environment")


@pytest.fixture
def fst(installed: dict[str, str], tmp_path: Path) -> Fst:
    """Runs `fst` of the installed wheel, with another working directory."""

    def run(*words: str | Path) -> "subprocess.CompletedProcess[str]":
        command = ["python", "-P", "-m", "full_stack_transformer", *map(str, words)]
        command[0] = f"{installed['PATH']}/python"
        return subprocess.run(
            command, env=installed, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    return run


def test_an_installed_wheel_generates_with_its_decoder(fst: Fst, model_dir: Path) -> None:
    done = fst("generate", model_dir, "--prompt", "The", "--max_new_tokens", "8", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert f"C++ ({machine.instruction_sets()[0]})" in done.stderr
    assert "compiling" not in done.stderr


@pytest.mark.slow
def test_an_installed_wheel_trains(fst: Fst, dataset_dir: Path) -> None:
    options = ("--model_config", "tiny", "--max_steps", "2", "--accelerator", "cpu")
    done = fst("train", "--dataset_dir", dataset_dir, "--experiment_name", "wheel", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "data/experiments/wheel/0\n"


@pytest.fixture
def url(installed: dict[str, str], model_dir: Path) -> Iterator[str]:
    """Address of the service of an installed wheel."""
    python = f"{installed['PATH']}/python"
    command = [python, "-P", "-m", "full_stack_transformer", "serve", str(model_dir), "--port", "0"]
    process = LoggedProcess(command, "serving ", installed)
    try:
        address = re.search(r"http://[0-9.]+:[0-9]+", process.start())
        assert address is not None
        yield address.group()
        assert process.stop() == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_an_installed_wheel_serves_its_playground(url: str) -> None:
    page = httpx.get(url, timeout=60)
    assert page.status_code == 200 and "<html" in page.text
    body = {"seed_text": "The", "generation_max_len": 5}
    texts = httpx.post(f"{url}/generated_texts/", json=body, timeout=60).json()
    assert texts


def test_without_a_compiler_the_wheel_fits_everywhere(tmp_path: Path) -> None:
    wheel = _build_wheel(tmp_path, {"CXX": "/none", "PATH": str(Path(sys.executable).parent)})
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
