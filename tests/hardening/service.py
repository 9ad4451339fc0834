"""A service of one's own to be hard on: a tiny model, short deadlines, and an eye on its process."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.logged_process import LoggedProcess, running_service
from tests.serving.tiny_model import make_tiny_model

SHORT_DEADLINES = ("--header_timeout_seconds", "1", "--body_timeout_seconds", "1.5")


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    process: LoggedProcess

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port = re.findall(r"//([^:]+):(\d+)", self.url)[0]
        return host, int(port)

    def metric(self, name: str) -> float:
        """One value of /metrics, over all models."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.findall(rf"^{name}(?:{{.*}})? (.*)$", text, re.MULTILINE)
        return sum(map(float, found))

    def num_files(self) -> int:
        """Descriptors that the process has open."""
        return psutil.Process(self.process.pid).num_fds()

    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextlib.contextmanager
def hardening_service(model: str | Path | None, *options: str) -> Iterator[Service]:
    """`fst serve` with short deadlines, on a tiny model unless another is named."""
    with contextlib.ExitStack() as stack:
        if model is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = make_tiny_model(root)
        words = (*SHORT_DEADLINES, *options)
        url, process = stack.enter_context(running_service(Path(model), *words))
        yield Service(url, process)
