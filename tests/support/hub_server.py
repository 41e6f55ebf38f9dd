"""A hub of data sets on loopback: just what huggingface_hub and datasets ask for, from folders of this machine.

Start a process with `environment(server)` to make it ask this hub. `server.asked` lists the paths that were asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folders: dict[str, dict[str, Path]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.requested: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, repository: str, folder: Path, commit: str, branch: str = "main") -> None:
        """Make `folder` the content of a repository at `commit`, where `branch` points from now on."""
        self.folders.setdefault(repository, {})[commit] = folder
        self.branches.setdefault(repository, {})[branch] = commit


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requested.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        if words[:2] == ["api", "datasets"] and len(words) >= 4:
            self._api("/".join(words[2:4]), words[4:], body)
        elif words[0] == "datasets" and len(words) > 5 and words[3] == "resolve":
            self._file("/".join(words[1:3]), words[4], "/".join(words[5:]))
        else:
            self._error(404, "EntryNotFound")

    def _api(self, repository: str, path_parts: list[str], body: bytes) -> None:
        kind, revision, inside = (
            (path_parts or ["revision"])[0],
            (path_parts[1:2] or ["main"])[0],
            "/".join(path_parts[2:]),
        )
        snapshot = self._folder(repository, revision)
        if snapshot is None:
            return
        commit, folder = snapshot
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if kind == "revision":
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            self._json({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        elif kind == "tree":
            start = folder / inside
            if not start.is_dir():
                self._error(404, "EntryNotFound")
                return
            recursive = "recursive=true" in self.path.lower()
            inner = sorted(start.rglob("*") if recursive else start.iterdir())
            self._json([_entry(path, folder) for path in inner])
        elif kind == "paths-info":
            text = body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else _form(text)
            self._json([_entry(folder / path, folder) for path in paths if (folder / path).exists()])
        else:
            self._error(404, "EntryNotFound")

    def _file(self, repository: str, revision: str, name: str) -> None:
        snapshot = self._folder(repository, revision)
        if snapshot is None:
            return
        commit, folder = snapshot
        file = folder / name
        if not file.is_file():
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        content = file.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        status = 200
        if byte_range := self.headers.get("Range"):
            first, _, last = byte_range.removeprefix("bytes=").partition("-")
            start, end = int(first or 0), min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self._send(status, content, headers | {"Content-Type": "application/octet-stream"})

    def _folder(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """Find commit and folder; answers with the hub's own errors where there is none."""
        if repository not in self.server.folders:
            self._error(401, "RepoNotFound")
            return None
        if repository in self.server.gated:
            self._error(403, "GatedRepo")
            return None
        commit = self.server.branches[repository].get(revision, revision)
        folder = self.server.folders[repository].get(commit)
        if folder is None:
            self._error(404, "RevisionNotFound")
            return None
        return commit, folder

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: Path, folder: Path) -> dict[str, object]:
    name = str(path.relative_to(folder))
    digest = hashlib.sha1(path.read_bytes() if path.is_file() else name.encode()).hexdigest()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": digest, "size": 0}
    return {"type": "file", "path": name, "oid": digest, "size": path.stat().st_size}


def _form(text: str) -> list[str]:
    from urllib.parse import parse_qs

    return parse_qs(text).get("paths", [])


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Return what makes a process ask this hub, with a cache of its own."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
    }
