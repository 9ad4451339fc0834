"""Continuous integration runs the test command of the README, and the pins are complete."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    names = [_normalized(name) for name, _ in pairs]
    assert len(names) == len({*names}), "a package that is pinned twice cannot be installed"
    return {_normalized(name): version for name, version in pairs}


def test_ci_calls_make_test() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert script.strip().splitlines()[-1] == "make test"
    assert "make test" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_torch_is_pinned_to_the_version_that_has_a_processor_build() -> None:
    assert _pins()["torch"] == "2.13.0"


def test_every_dependency_is_pinned_to_what_the_tests_run_with() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"]]
    for extra in extras.values():
        required += extra
    pins = _pins()
    installed = {_normalized(one.metadata["Name"]): one.version for one in distributions()}
    for requirement in required:
        name = _normalized(re.split(r"[<>=\[ ;]", requirement)[0])
        if name != "full-stack-transformer":
            assert name in pins, f"{name} is not in constraints.txt"
            # The tests that need this extra are skipped without it.
            if name in installed or requirement not in extras["harness"]:
                assert installed[name].split("+")[0] == pins[name]
