"""The part of the Hugging Face hub that takes models, on loopback: accounts, repositories, uploads of large files, commits."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN_OWNER = "ada"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)


class UploadHub(ThreadingHTTPServer):
    """Knows one account, `ada`, of the organization `lab`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.role = "write"
        self.refuses_token = False
        self.refused_owners: set[str] = set()
        """Owners for whom creating or writing is answered with 403."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[UploadHub]:
    hub = UploadHub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if self.server.refuses_token:
            self._answer(401, {"error": "Invalid user token."})
        elif path == "/api/whoami-v2":
            account = {"type": "user", "name": TOKEN_OWNER, "orgs": [{"name": "lab"}]}
            self._answer(200, account | {"auth": {"accessToken": {"role": self.server.role}}})
        elif path.startswith("/api/models/") and (name := _repository(path)) in self.server.repositories:
            self._answer(
                200, {"id": name, "private": self.server.repositories[name].private, "siblings": [], "tags": []}
            )
        else:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        path, body = unquote(urlparse(self.path).path), self._body()
        owner = json.loads(body).get("organization") or TOKEN_OWNER if path == "/api/repos/create" else ""
        if owner in self.server.refused_owners:
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif path == "/api/repos/create":
            self._create(owner, json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False} for file in files]
            self._answer(200, {"files": modes})
        elif "/commit/" in path:
            self._commit(_repository(path), [json.loads(line) for line in body.splitlines() if line])
        else:
            self._answer(503, {"error": "unavailable"})

    def _create(self, owner: str, requested: dict[str, Any]) -> None:
        name = f"{owner}/{requested['name']}"
        if name in self.server.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
            return
        private = requested.get("private", requested.get("visibility") == "private")
        self.server.repositories[name] = Repository(private=bool(private))
        self._answer(200, {"url": f"{self.server.url}/{name}", "id": name})

    def _batch(self, requested: dict[str, Any]) -> None:
        objects = [
            {
                **requested_object,
                "actions": {"upload": {"href": f"{self.server.url}/objects/{requested_object['oid']}"}},
            }
            for requested_object in requested["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.titles.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.objects[value["oid"]]
        address = f"{self.server.url}/{name}/commit/{len(repository.titles):040x}"
        self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": address, "hookOutput": ""})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _repository(path: str) -> str:
    return "/".join(path.removeprefix("/api/models/").split("/")[:2])


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
