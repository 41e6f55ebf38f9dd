"""A hosted service with fine-tuned models, whose answers are objects of the official client's types, and which fails as told."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from openai.types import FileObject, Model
from openai.types.chat import ChatCompletion
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

BLOCK = 1 << 20


class Hosted:
    """What the service knows, and what it was asked."""

    def __init__(self, jobs: int = 3, rows: int = 20, page: int = 2, key: str = "sk-secret-0123456789"):
        self.key, self.page, self.header = key, page, "authorization"
        self.azure_version = ""
        self.failures: list[str] = []
        """For the next requests, one each: a status, or `cut`."""
        self.ranges = True
        self.delay = 0.0
        self.refused: dict[str, str] = {}
        """Parameters that no model takes: their name, and the message."""
        self.gone: set[str] = set()
        self.answer: Callable[[dict[str, Any]], dict[str, Any]] = self.complete
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        """Successful requests, by path and query; answers by model and prompt."""
        self.bytes_sent: Counter[str] = Counter()
        self.contents = {
            f"file-train{number}": "".join(
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": f"question {number} {row}"},
                            {"role": "assistant", "content": f"answer {row}", "weight": 1},
                        ],
                        "user": f"user-{row % 5}",
                    }
                )
                + "\n"
                for row in range(rows)
            ).encode()
            for number in range(jobs)
        }
        self.huge: dict[str, int] = {}
        """Sizes in bytes of files whose content is made as it is sent."""
        self.jobs = [self.make_job(number) for number in range(jobs)]
        self.models = [Model(id="gpt-4o-2024-08-06", created=1, object="model", owned_by="system").to_dict()]
        self.models[0]["shutdown_date"] = "2027-01-14"

    def make_job(self, number: int) -> dict[str, Any]:
        return FineTuningJob.model_validate(
            {
                "id": f"ftjob-{number}",
                "object": "fine_tuning.job",
                "created_at": 100 - number,
                "error": None,
                "fine_tuned_model": f"ft:gpt-4o-2024-08-06:acme::{number}",
                "finished_at": 200,
                "hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.8},
                "model": "gpt-4o-2024-08-06",
                "organization_id": "org",
                "result_files": [],
                "seed": 7,
                "status": "succeeded",
                "trained_tokens": 1000,
                "training_file": f"file-train{number}",
                "validation_file": None,
            }
        ).to_dict()

    def events(self, job: str) -> list[dict[str, Any]]:
        return [
            FineTuningJobEvent(
                id=f"{job}-event-{n}", created_at=n, level="info", message=f"step {n}", object="fine_tuning.job.event"
            ).to_dict()
            for n in range(3)
        ]

    def checkpoints(self, job: str) -> list[dict[str, Any]]:
        checkpoint = {"id": f"{job}-cp", "created_at": 1, "fine_tuned_model_checkpoint": f"{job}:step-1"}
        rest = {"fine_tuning_job_id": job, "metrics": {}, "object": "fine_tuning.job.checkpoint", "step_number": 1}
        return [FineTuningJobCheckpoint.model_validate(checkpoint | rest).to_dict()]

    def files(self) -> list[dict[str, Any]]:
        sizes = {name: len(content) for name, content in self.contents.items()} | self.huge
        return [
            FileObject(
                id=name, bytes=size, created_at=1, filename=f"{name}.jsonl", object="file", purpose="fine-tune",
                status="processed",
            ).to_dict()
            for name, size in sizes.items()
        ]  # fmt: skip

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        words = hashlib.sha256(json.dumps([body["model"], body["messages"]]).encode()).hexdigest()[:8]
        token = {"token": words, "logprob": -0.25, "bytes": [*words.encode()], "top_logprobs": []}
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": words, "refusal": None},
            "logprobs": {"content": [token], "refusal": None} if body.get("logprobs") else None,
        }
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"]}
        return ChatCompletion.model_validate(answer | {"choices": [choice], "usage": usage}).to_dict()

    def page_of(self, entries: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        ids = [entry.get("id") for entry in entries]
        start = ids.index(query["after"]) + 1 if "after" in query else 0
        data = entries[start : start + self.page]
        return {"object": "list", "data": data, "has_more": start + self.page < len(entries)}

    def get(self, path: str, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        parts = path.strip("/").split("/")
        if path == "/models":
            return 200, {"object": "list", "data": self.models}
        if path == "/files":
            return 200, self.page_of(self.files(), query)
        if path == "/fine_tuning/jobs":
            return 200, self.page_of(self.jobs, query)
        if len(parts) == 4 and parts[3] in ("events", "checkpoints"):
            return 200, self.page_of(getattr(self, parts[3])(parts[2]), query)
        if parts[0] == "files" and len(parts) == 2:
            known = {entry["id"]: entry for entry in self.files()}
            if parts[1] in known:
                return 200, known[parts[1]]
        return 404, {"error": {"message": f"no such object: {path}", "type": "invalid_request_error"}}


@contextmanager
def serving(hosted: Hosted, port: int = 0) -> Iterator[str]:
    """Serve the service; yields its address without a path."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def fails(self) -> bool:
            expected = hosted.key if hosted.header == "api-key" else f"Bearer {hosted.key}"
            if self.headers.get(hosted.header) != expected:
                # as the real service does, but with the whole key
                self.reply(
                    401, {"error": {"message": f"Incorrect API key provided: {self.headers.get(hosted.header)}"}}
                )
                return True
            with hosted.lock:
                failure = hosted.failures.pop(0) if hosted.failures else ""
            if failure == "cut" and self.path.partition("?")[0].endswith("/content"):
                self.close_connection = True
            elif failure == "cut":
                self.send_response(200)
                self.send_header("content-length", "1000")
                self.end_headers()
                self.wfile.write(b'{"data": [')
                self.close_connection = True
            elif failure:
                self.reply(int(failure), {"error": {"message": "not now"}}, {"retry-after": "0.01"})
            return bool(failure)

        def split(self) -> tuple[str, dict[str, str]]:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            path = unquote(parts.path)
            if hosted.azure_version:
                assert query.pop("api-version") == hosted.azure_version
                return path.removeprefix("/openai"), query
            return path.removeprefix("/openai").removeprefix("/v1"), query

        def do_GET(self) -> None:
            if self.fails():
                return
            path, query = self.split()
            if path.endswith("/content"):
                self.send_content(path.split("/")[2])
                return
            status, answer = hosted.get(path, query)
            with hosted.lock:
                hosted.requests[f"{path} {query.get('after', '')}"] += 1
            self.reply(status, answer)

        def send_content(self, name: str) -> None:
            content = hosted.contents.get(name)
            size = hosted.huge.get(name, len(content or b""))
            if not size:
                self.reply(404, {"error": {"message": "the file has been deleted"}})
                return
            start = 0
            if hosted.ranges and (asked := self.headers.get("range")):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= size:
                    self.reply(416, {})
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("content-range", f"bytes {start}-{size - 1}/{size}")
            self.send_header("content-length", str(size - start))
            self.end_headers()
            with hosted.lock:
                cut = hosted.failures.pop(0) if hosted.failures else ""
            end = start + (size - start) // 2 if cut == "cut" else size
            while start < end:
                block = content[start:end] if content else huge_block(start, min(start + BLOCK, end))
                self.wfile.write(block)
                start += len(block)
                hosted.bytes_sent[name] += len(block)
            self.close_connection = end < size

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.fails():
                return
            path, _ = self.split()
            assert path.endswith("/chat/completions")
            if hosted.azure_version:
                assert path == f"/deployments/{body['model']}/chat/completions"
            time.sleep(hosted.delay)
            for parameter, message in hosted.refused.items():
                if parameter in body:
                    self.reply(400, {"error": {"message": message, "param": parameter}})
                    return
            if body["model"] in hosted.gone:
                self.reply(404, {"error": {"message": "the model has been switched off"}})
                return
            with hosted.lock:
                hosted.requests[json.dumps([body["model"], body["messages"]])] += 1
            self.reply(200, hosted.answer(body))

        def reply(self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *unused: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *unused: Any) -> None:
            """A client that is killed is none of the test's concern."""

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def huge_block(start: int, end: int) -> bytes:
    """Return the bytes from `start` to `end` of a file that repeats a line of 64 bytes, each with its number."""
    first = start // 64
    lines = b"".join(b'{"n": "%054d"}\n' % n for n in range(first, -(-end // 64)))
    return lines[start - 64 * first : end - 64 * first]
