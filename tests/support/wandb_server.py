"""A W&B server on the loopback interface, as far as the real client asks one: it keeps what is sent for each run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40


class Server(ThreadingHTTPServer):
    """Lines of each file stream by run id and offset, as the real server stores them: a line again replaces the old one."""

    daemon_threads = True

    def __init__(self, *, key: str = KEY):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = key
        self.runs: dict[str, dict[str, Any]] = {}
        self.requested: list[str] = []
        self.received: list[str] = []
        """Every request's body."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def history(self, run: str) -> list[dict[str, Any]]:
        lines = self.runs[run]["files"].get("wandb-history.jsonl", {})
        return [json.loads(lines[place]) for place in sorted(lines)]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    do_PUT = do_GET

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        self.server.received.append(text)
        import base64

        credentials = base64.b64decode(self.headers.get("Authorization", "Basic ").removeprefix("Basic ")).decode()
        if credentials.removeprefix("api:") != self.server.key:
            self._answer({"errors": [{"message": "user is not logged in", "path": ["viewer"]}]}, 401)
        elif self.path == "/graphql":
            body = json.loads(text)
            self._answer(self._graphql(body["query"], body.get("variables") or {}))
        elif self.path.endswith("/file_stream"):
            self._stream(self.path.split("/")[-2], json.loads(text))
            self._answer({})
        else:
            self._answer({})

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = query.split("(")[0].split("{")[0].split()[1]
        self.server.requested.append(name)
        data: dict[str, Any] = {}
        if name == "ServerFeaturesQuery":
            data = {"serverInfo": {"features": []}}
        elif name == "Viewer":
            data = {
                "viewer": {
                    "id": "1",
                    "entity": "me",
                    "username": "me",
                    "email": "",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            }
        elif name == "RunResumeStatus":
            data = {"model": {"name": "p", "entity": {"name": "me"}, "bucket": self._status(variables["name"])}}
        elif name == "UpsertBucket":
            run = variables["name"] or variables["id"]
            stored = self.server.runs.setdefault(run, {"files": {}, "sent": {}})
            inserted = not stored["sent"]
            stored["sent"] |= {key: value for key, value in variables.items() if value is not None}
            project = {"name": "p", "entity": {"name": "me"}}
            bucket = {
                "id": run,
                "name": run,
                "displayName": variables.get("displayName"),
                "description": None,
                "config": None,
                "sweepName": None,
                "project": project,
                "historyLineCount": 0,
            }
            data = {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        elif name == "ArtifactType":
            data = {"project": None}
        elif name == "CreateArtifact":  # as if it were there already: nothing is uploaded
            data = {
                "createArtifact": {
                    "artifact": {
                        "id": "1",
                        "state": "COMMITTED",
                        "artifactSequence": {"id": "1", "latestArtifact": {"id": "1", "versionIndex": 0}},
                    }
                }
            }
        elif name == "CreateRunFiles":
            data = {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": []}}
        return {"data": data}

    def _status(self, run: str) -> dict[str, Any] | None:
        stored = self.server.runs.get(run)
        if stored is None:
            return None
        files = stored["files"]
        history = files.get("wandb-history.jsonl", {})
        tail = [history[max(history)]] if history else []
        return {
            "name": run,
            "summaryMetrics": "{}",
            "displayName": "",
            "logLineCount": 0,
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
        }

    def _stream(self, run: str, body: dict[str, Any]) -> None:
        stored = self.server.runs[run]
        for file, chunk in (body.get("files") or {}).items():
            lines = stored["files"].setdefault(file, {})
            for number, line in enumerate(chunk["content"]):
                lines[chunk["offset"] + number] = line
        if body.get("complete"):
            stored["exit_code"] = body.get("exitcode")

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextmanager
def wandb_server(*, key: str = KEY) -> Iterator[Server]:
    server = Server(key=key)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
