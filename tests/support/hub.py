"""A local Hugging Face hub: serves folders as the real one serves models and datasets."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890" * 4

_ABOUT = re.compile(
    "/api/(?P<type>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<kind>revision|tree)/(?P<revision>[^/]+)"
)
_FILE = re.compile("/(?P<type>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Hub:
    """A running hub.

    Attributes:
        models: Folder of each model by name.
        datasets: Folder of each dataset by name.
        gated: Names of repositories that are refused.
        downloads: Downloaded files in order: ``owner/name/file``.
        url: Its address, for ``HF_ENDPOINT``.
    """

    def __init__(self, models: Mapping[str, Path], datasets: Mapping[str, Path], url: str) -> None:
        self.models = models
        self.datasets = datasets
        self.gated: set[str] = set()
        self.downloads: list[str] = []
        self.url = url

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process that uses this hub, with its cache in *home*."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}


@contextmanager
def serving(models: Mapping[str, Path], datasets: Mapping[str, Path] = {}) -> Iterator[Hub]:
    """Serve *models* and *datasets*, folders by name, while the context lasts. Their only revision is ``main``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(is_head=True)

        def do_GET(self) -> None:
            self._answer(is_head=False)

        def log_message(self, *_: object) -> None:
            """Write nothing to standard error."""

        def _answer(self, *, is_head: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            asked = _ABOUT.fullmatch(path) or _FILE.fullmatch(path)
            served = datasets if asked is not None and (asked["type"] or "").startswith("datasets") else models
            if asked is None or asked["name"] not in served:
                self._send(404, {"X-Error-Code": "RepoNotFound"})
            elif asked["revision"] not in ("main", COMMIT):
                self._send(404, {"X-Error-Code": "RevisionNotFound"})
            elif asked["name"] in hub.gated:
                self._send(403, {"X-Error-Code": "GatedRepo"})
            elif asked.re is _FILE:
                self._file(asked["name"], served[asked["name"]] / asked["file"], is_head=is_head)
            else:
                about = self._about(served[asked["name"]], asked["kind"], asked["name"])
                self._send(200, body=json.dumps(about).encode(), is_head=is_head)

        def _about(self, folder: Path, kind: str, name: str) -> object:
            files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*"))}
            files = {path: file for path, file in files.items() if file.is_file()}
            if kind == "tree":
                return [
                    {"type": "file", "path": path, "size": one.stat().st_size, "oid": _digest(one)[:40]}
                    for path, one in files.items()
                ]
            return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}

        def _file(self, name: str, file: Path, *, is_head: bool) -> None:
            if not file.is_file():
                self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            if not is_head:
                hub.downloads.append(f"{name}/{file.name}")
            headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT}
            self._send(200, headers, file.read_bytes(), is_head=is_head)

        def _send(
            self, status: int, headers: Mapping[str, str] = {}, body: bytes = b"", *, is_head: bool = False
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not is_head:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(models, datasets, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
