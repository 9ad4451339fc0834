"""What metadata.toml names is fetched once, and only taken with its checksum."""

import hashlib
import http.server
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.datasets.downloads import download
from full_stack_transformer.datasets.hub_rows import hub_rows
from full_stack_transformer.datasets.rows import PLACE
from full_stack_transformer.errors import InputError, MachineError, MissingExtraError, RowError

_CONTENT = b"a text\n" * 1000


class _Handler(http.server.BaseHTTPRequestHandler):
    requests: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.requests.append(self.path)
        self.send_response(200 if self.path == "/x.txt" else 404)
        self.send_header("Content-Length", str(len(_CONTENT)))
        self.end_headers()
        self.wfile.write(_CONTENT)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    """A server that has one file."""
    _Handler.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _metadata(directory: Path, server: str, **facts: str) -> Path:
    content = {
        "url": f"{server}/x.txt",
        "filename": "x.txt",
        "sha256": hashlib.sha256(_CONTENT).hexdigest(),
        **facts,
    }
    path = directory / "metadata.toml"
    path.write_text("".join(f'{name} = "{value}"\n' for name, value in content.items()))
    return path


def test_a_file_is_fetched_once(url: str, tmp_path: Path) -> None:
    metadata = _metadata(tmp_path, url)
    for _ in range(2):
        assert download(metadata).read_bytes() == _CONTENT
    assert _Handler.requests == ["/x.txt"]


def test_another_checksum_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="should have the SHA-256 00"):
        download(_metadata(tmp_path, url, sha256="00"))
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.toml"]
    (tmp_path / "x.txt").write_text("changed")
    with pytest.raises(InputError, match="delete it and fetch it again"):
        download(_metadata(tmp_path, url))


def test_what_cannot_be_fetched_is_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="404"):
        download(_metadata(tmp_path, url, url=f"{url}/none"))
    with pytest.raises(InputError, match="must be a plain name"):
        download(_metadata(tmp_path, url, filename="../x"))
    (tmp_path / "metadata.toml").write_text('url = "x"\n')
    with pytest.raises(InputError, match="should have filename"):
        download(tmp_path / "metadata.toml")


class _Part(list[dict[str, Any]]):
    features = {  # noqa: RUF012
        "label": types.SimpleNamespace(names=["no", "yes"]),
        "tags": types.SimpleNamespace(feature=types.SimpleNamespace(names=["O", "B-X"])),
    }


def _install(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_classes_of_a_hub_data_set_get_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    part = _Part([{"text": "a", "label": 1, "tags": [0, 1]}])
    _install(monkeypatch, lambda path, configuration: {"train": part, "validation": part})
    rows = hub_rows("nyu-mll/glue:sst2")
    [row] = rows["valid"]
    assert (row["label"], row["tags"]) == ("yes", ["O", "B-X"])
    assert "sst2 validation, row 0" in row[PLACE]


def test_a_loading_script_is_named_with_its_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    _install(monkeypatch, load)
    with pytest.raises(RowError, match="refs/convert/parquet"):
        hub_rows("x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="pip install datasets"):
        hub_rows("x")
