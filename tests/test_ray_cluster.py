"""The connection to Ray: what workers may import, and what a user reads where there is none."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from full_stack_transformer import ray_cluster
from full_stack_transformer.arguments.checks import ClusterOptions, check_ray_address
from full_stack_transformer.errors import MachineError, MissingExtraError, UsageError
from full_stack_transformer.machine import num_cores

_REPOSITORY = Path(__file__).parents[1]
# Prints what a worker can import of the working directory, and where SIGTERM leads to after it.
_DRIVER = """
import signal, sys
from full_stack_transformer.own_classes import trust
from full_stack_transformer.ray_cluster import connected
from full_stack_transformer.errors import FullStackTransformerError

trust(["mine"])
try:
    with connected(sys.argv[1]) as cluster:
        import ray

        @ray.remote
        def found() -> list[str]:
            from importlib.util import find_spec
            return [name for name in ("mine", "theirs") if find_spec(name)]

        print("as Ray prints")
        names = ray.get(found.remote())
    print(cluster.num_nodes, cluster.num_cpus, *names)
    print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
except FullStackTransformerError as error:
    sys.exit(str(error))
"""


def _run_driver(
    address: str, directory: Path, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", _DRIVER, address],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_local_cluster_takes_along_trusted_code_alone_and_leaves_nothing(tmp_path: Path) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / f"{name}.py").write_text("")
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
    }
    environment |= {"HOME": str(home), "PYTHONPATH": str(_REPOSITORY)}
    done = _run_driver("local", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    words, handler = done.stdout.splitlines()
    assert words.split()[:2] == ["1", str(num_cores())]
    assert words.split()[2:] == ["mine"]
    assert handler == "True"
    assert done.stderr == "as Ray prints\n"
    assert not list(home.rglob("auth_token*"))


def test_an_address_where_nothing_answers_is_one_sentence() -> None:
    with pytest.raises(MachineError, match=r"nothing answers there .*ray start --head --port=1$"):
        ray_cluster._check_answer("127.0.0.1:1")


@pytest.mark.parametrize(
    ("address", "error", "expected"),
    [
        ("auto", ConnectionError("Could not find any"), "no cluster of Ray runs on this machine"),
        ("h:1", RuntimeError("Version mismatch: The\ncluster"), "install the same versions"),
        ("h:1", ConnectionError("Failed to connect to Ray"), "RAY_AUTH_TOKEN as on its head"),
        ("h:1", RuntimeError("No node info found"), "ray start --address=h:1$"),
        ("local", RuntimeError("no space"), "Ray cannot be started here: no space$"),
    ],
)
def test_what_ray_says_becomes_advice(address: str, error: Exception, expected: str) -> None:
    message = ray_cluster._why_not(address, error)
    assert message.startswith(f"--ray_address {address}: ")
    assert "\n" not in message
    with pytest.raises(MachineError, match=expected):
        raise MachineError(message)


@pytest.mark.parametrize(
    "address", ["here", "host", "host:", "host:0", "host:99999", "ray://h:1", ""]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="--ray_address must be auto, local, or HOST:PORT"):
        check_ray_address(ClusterOptions(ray_address=address))


@pytest.mark.parametrize(
    "address", [None, "auto", "local", "10.0.0.1:6379", "node-1.lan:1", "[::1]:6379"]
)
def test_addresses(address: str | None) -> None:
    check_ray_address(ClusterOptions(ray_address=address))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"\[distributed\]"):
        ray_cluster.imported_ray()
