"""A service of one's own to be hard on: a tiny model, short deadlines, and an eye on its process."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from transformers import AutoModelForCausalLM

from tests.generation.small_adapters import write_adapter
from tests.logged_process import LoggedProcess, running_service
from tests.serving.tiny_model import make_tiny_model

ADMIN_KEY = "an-admin-key-of-the-tests"
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


def adapter_options(root: Path) -> tuple[str, ...]:
    """Options for who has the admin key to load adapters below a root."""
    (root / "admin_keys").write_text(ADMIN_KEY + "\n")
    return ("--admin_keys_file", str(root / "admin_keys"), "--adapters_root", str(root))


def write_small_adapter(root: Path, model: Path) -> None:
    """The adapter x of a model below a root."""
    write_adapter(root / "x", AutoModelForCausalLM.from_pretrained(model))


@contextlib.contextmanager
def hardening_service(model: str | Path | None, *options: str) -> Iterator[Service]:
    """`fst serve` with short deadlines, on a tiny model unless another is named."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if model is None:
            model = make_tiny_model(root)
            write_small_adapter(root, model)
        words = (*SHORT_DEADLINES, *adapter_options(root), *options)
        url, process = stack.enter_context(running_service(Path(model), *words))
        yield Service(url, process)
