"""A hub on this machine with one model, as far as its client asks: facts, a list of files, and the files."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789" * 4


@contextlib.contextmanager
def running_hub(name: str, directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths of the requests so far."""
    asked: list[str] = []
    files = {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            content, kind = self._content(path), "application/json"
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def _content(self, path: str) -> bytes | None:
            if path.startswith(f"/api/models/{name}/tree/"):
                return json.dumps(
                    [
                        {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                        for file, data in files.items()
                    ]
                ).encode()
            if path == f"/api/models/{name}" or path.startswith(f"/api/models/{name}/revision/"):
                siblings = [{"rfilename": file} for file in files]
                return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            for start in (f"/{name}/resolve/{COMMIT}/", f"/{name}/resolve/main/"):
                if path.startswith(start):
                    return files.get(path.removeprefix(start))
            return None

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
