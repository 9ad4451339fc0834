"""What metadata.toml names is fetched once, and only taken with its checksum."""

import hashlib
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from full_stack_transformer.errors import InputError, MachineError, MissingExtraError, RowError
from full_stack_transformer.rows.downloads import download
from full_stack_transformer.rows.fields import PLACE
from full_stack_transformer.rows.splits import hub_rows

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
        path = download(metadata)
        assert path.read_bytes() == _CONTENT
        assert path.stat().st_mode & 0o777 == 0o644
    assert _Handler.requests == ["/x.txt"]


def test_another_checksum_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="should have the SHA-256 00"):
        download(_metadata(tmp_path, url, sha256="00"))
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.toml"]
    (tmp_path / "x.txt").write_text("changed")
    with pytest.raises(InputError, match="delete it and fetch it again"):
        download(_metadata(tmp_path, url))
    assert (tmp_path / "x.txt").read_text() == "changed"


def test_what_cannot_be_fetched_is_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="404"):
        download(_metadata(tmp_path, url, url=f"{url}/none"))
    with pytest.raises(InputError, match="invalid URL"):
        download(_metadata(tmp_path, url, url=r"http://\u0000"))
    with pytest.raises(InputError, match="must be a plain name"):
        download(_metadata(tmp_path, url, filename="../x"))
    (tmp_path / "metadata.toml").write_text('url = "x"\n')
    with pytest.raises(InputError, match="should have filename"):
        download(tmp_path / "metadata.toml")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where data sets lie that the package `datasets` loads; its cache is elsewhere."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    datasets.disable_progress_bars()
    return tmp_path / "hub"


def test_classes_of_a_hub_data_set_get_their_names(hub: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], [-1, -1]]}
    for split in ("train", "validation"):
        path = hub / "pairs" / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    found = hub_rows(str(hub / "pairs"))
    assert list(found) == ["train", "valid"]
    first, second = found["valid"]
    assert (first["label"], first["tags"]) == ("yes", ["O", "B-X"])
    assert (second["label"], second["tags"]) == (-1, None)  # of a test split, without labels
    assert "pairs validation, row 0" in first[PLACE]


def test_a_loading_script_is_named_with_its_replacement(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub / "scripted").mkdir(parents=True)
    (hub / "scripted" / "scripted.py").write_text("import datasets\n", encoding="utf-8")
    with pytest.raises(RowError, match="refs/convert/parquet"):
        hub_rows(str(hub / "scripted"))
    with pytest.raises(RowError, match="cannot be loaded"):
        hub_rows(str(hub / "nothing"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="pip install datasets"):
        hub_rows("x")
