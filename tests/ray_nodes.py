"""A cluster of Ray on this machine: several nodes, each of which a test can kill.

Each node is `ray start --block` with its own raylet, object store and workers. Started in about 10 s for all
nodes together: one cluster for a file of tests.
"""

import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from tests.logged_process import LoggedProcess

_REPOSITORY = Path(__file__).parents[1]
_RAY = str(Path(sys.executable).with_name("ray"))
_STARTED = "Ray runtime started"
_SECONDS_FOR_HEAD = 60.0
# The same for all clusters of a test run: Ray reads it once in a process.
_TOKEN = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


class RayNode:
    """One node; node 0 is the head."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._process = LoggedProcess([_RAY, "start", "--block", *command], _STARTED, environment)

    def start(self) -> "RayNode":
        """Start it and wait until it has joined."""
        self._process.start()
        return self

    @property
    def processes(self) -> list[psutil.Process]:
        """All of its processes: raylet, workers and what else Ray starts."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            return [top, *top.children(recursive=True)]
        return []

    @property
    def workers(self) -> list[psutil.Process]:
        """Its workers: actors, replicas and tasks, also idle ones."""
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
                    found.append(process)
        return found

    def kill(self) -> None:
        """kill -9 of all of its processes: the node is gone."""
        processes = self.processes
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)
        self._process.kill()


class RayNodes:
    """A cluster; `address` is that of its head, `environment` lets a command connect to it."""

    def __init__(self, directory: Path, num_cpus: int) -> None:
        self._directory = directory
        self._num_cpus = num_cpus
        self.address = f"127.0.0.1:{_free_port()}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": _TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "HOME": str(directory),  # nothing is left in the user's
            "PYTHONPATH": str(_REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        self.nodes: list[RayNode] = []

    def start(self, num_nodes: int) -> None:
        """Start the head and the other nodes."""
        port = self.address.rpartition(":")[2]
        head = RayNode(
            [
                *("--head", f"--port={port}", f"--temp-dir={self._directory}"),
                *(f"--ray-client-server-port={_free_port()}", "--include-dashboard=false"),
                *self._options(),
            ],
            self.environment,
        )
        self.nodes = [head]
        with ThreadPoolExecutor(num_nodes) as threads:
            starting = [threads.submit(head.start)]
            _wait_for(int(port))
            for _ in range(num_nodes - 1):
                self.nodes.append(self._new_node())
                starting.append(threads.submit(self.nodes[-1].start))
            for one in starting:
                one.result()

    def add(self) -> RayNode:
        """Start one more node, as after one was killed."""
        self.nodes.append(self._new_node())
        return self.nodes[-1].start()

    def stop(self) -> None:
        """Kill all nodes, the head last."""
        for node in reversed(self.nodes):
            node.kill()

    def _new_node(self) -> RayNode:
        return RayNode([f"--address={self.address}", *self._options()], self.environment)

    def _options(self) -> list[str]:
        return [
            *("--node-ip-address=127.0.0.1", f"--num-cpus={self._num_cpus}"),
            *("--object-store-memory=200000000", "--include-log-monitor=false"),
        ]


@contextlib.contextmanager
def ray_nodes(num_nodes: int = 2, *, num_cpus: int = 1) -> Iterator[RayNodes]:
    """A cluster of nodes with `num_cpus` CPUs each; killed at the end.

    Commands get `.environment`. For a driver in this process put RAY_AUTH_MODE and RAY_AUTH_TOKEN of it into
    `os.environ` before ray is imported.
    """
    # In /tmp, as the path of a socket has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="fst-ray-", dir="/tmp"))
    nodes = RayNodes(directory, num_cpus)
    try:
        nodes.start(num_nodes)
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def _wait_for(port: int) -> None:
    end = time.monotonic() + _SECONDS_FOR_HEAD
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end, "the head of Ray does not start"
            time.sleep(0.05)
        else:
            return
