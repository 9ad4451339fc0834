"""The connection to a cluster of Ray: one that runs, or one of this machine that ends with the command.

    auto        the cluster that this machine is a node of
    HOST:PORT   the same, by the address of its head
    local       started here, with a secret of its own, and ended with the `with`

A worker gets no directory of this machine to import from. What travels to it is the code that the user trusts
(`own_classes`), and nothing else; the package itself is installed on each node. Knows no stage.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from full_stack_transformer import interruption
from full_stack_transformer.errors import MachineError, MissingExtraError, install_command
from full_stack_transformer.machine import num_cores
from full_stack_transformer.own_classes import trusted_modules

logger = logging.getLogger(__name__)

# A head that does not answer within this is not there; Ray itself tries for half a minute and more.
_SECONDS_TO_ANSWER = 5.0
# Of a local cluster: Ray would take 30 % of the memory. Blocks of a few MB are on their way.
_LOCAL_STORE_BYTES = 500_000_000
# What to do where a cluster asks for its secret.
_HOW_TO_JOIN = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its head, or copy the head's "
    "~/.ray/auth_token"
)


@dataclass(frozen=True)
class Cluster:
    """What the cluster has."""

    address: str
    """HOST:PORT of its head."""
    num_nodes: int
    num_cpus: int
    num_gpus: int

    def __str__(self) -> str:
        parts = [_number(self.num_nodes, "node"), _number(self.num_cpus, "CPU")]
        if self.num_gpus:
            parts.append(_number(self.num_gpus, "GPU"))
        return f"{', '.join(parts)} at {self.address}"


@contextlib.contextmanager
def connected(address: str, *, modules: Sequence[str] | None = None) -> Iterator[Cluster]:
    """The cluster at `--ray_address`; inside the `with` this process is a driver of it.

    Ray's handler of SIGTERM is taken away again, its logs are left to the nodes, and what it prints goes to
    standard error.

    Args:
        address: auto, local or HOST:PORT.
        modules: own code that workers may import; those of them that are in the working directory are sent
            along. Default: the modules that are trusted by now.

    Raises:
        MachineError: nothing answers there, the versions differ, or this machine is no node of the cluster.
        MissingExtraError: Ray is not installed.
    """
    ray = imported_ray()
    if address not in ("auto", "local"):
        _check_answer(address)
    with tempfile.TemporaryDirectory(prefix="fst-code-") as code:
        _copy_modules(trusted_modules() if modules is None else modules, Path(code))
        _connect(ray, address, code)
    try:
        resources: dict[str, float] = ray.cluster_resources()
        cluster = Cluster(
            address=str(ray.get_runtime_context().gcs_address),
            num_nodes=sum(bool(node["Alive"]) for node in ray.nodes()),
            num_cpus=int(resources.get("CPU", 0)),
            num_gpus=int(resources.get("GPU", 0)),
        )
        logger.info("running on Ray: %s", cluster)
        # Ray prints what happens to nodes to standard output, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            yield cluster
    finally:
        ray.shutdown()


def imported_ray() -> Any:
    """The package ray, which reports nothing to its makers.

    Raises:
        MissingExtraError: it is not installed.
    """
    # Read while it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it announces a change
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtraError(
            "--ray_address needs the package ray, which is not installed; "
            f"install it with: {install_command('distributed')}"
        ) from error
    return ray


def _connect(ray: Any, address: str, code: str) -> None:
    options: dict[str, Any] = {
        "address": address,
        # With a working directory Ray does not put ours on the path of the workers.
        "runtime_env": {"working_dir": code},
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address == "local":
        # Ray listens on all interfaces, and refuses who has no token. Without one in the environment it
        # writes ~/.ray/auth_token, which changes each later cluster of the user.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {
            "num_cpus": num_cores(),
            "include_dashboard": False,
            "object_store_memory": _LOCAL_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    before = signal.getsignal(signal.SIGTERM)
    try:
        # Ctrl-C, which a terminal sends to what is started here too, is for this process alone.
        with interruption.held():
            ray.init(**options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise MachineError(_why_not(address, error)) from error
    finally:
        with contextlib.suppress(ValueError):  # another thread than the main one
            signal.signal(signal.SIGTERM, before)


def _check_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise MachineError(
            f"--ray_address {address}: nothing answers there ({error.strerror or error}); start its head "
            f"with: ray start --head --port={port}"
        ) from error


def _why_not(address: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    start = f"--ray_address {address}: "
    if address == "local":
        return f"{start}Ray cannot be started here: {text}"
    if "Version mismatch" in text:
        return f"{start}{text}; install the same versions of Python and Ray on all nodes"
    if type(error).__name__ == "AuthenticationError":
        return f"{start}the token is missing or another; {_HOW_TO_JOIN}"
    if address == "auto":
        return (
            f"{start}no cluster of Ray runs on this machine; start one with: ray start --head, or join one "
            f"with: ray start --address=HOST:PORT ({text})"
        )
    if "Failed to connect" in text:
        return (
            f"{start}what answers there does not let this command in; is it the head of Ray? If it wants a "
            f"token: {_HOW_TO_JOIN}"
        )
    return (
        f"{start}this machine cannot join the cluster as a driver: {text}; run the command on one of its "
        f"nodes, or make this machine one with: ray start --address={address}"
    )


def _copy_modules(modules: Sequence[str], directory: Path) -> None:
    """Copy those of the modules that are in the working directory; what is installed is on each node."""
    for name in {module.split(".")[0] for module in modules}:
        for source in (Path.cwd() / name, Path.cwd() / f"{name}.py"):
            if (source / "__init__.py").is_file():
                ignored = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(source, directory / name, ignore=ignored)
                break
            if source.is_file():
                shutil.copy(source, directory)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
