"""An OpenAI-compatible server whose answers are a function of the request, and which fails as told."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Write = Callable[[dict[str, Any]], str]


def words_of(body: dict[str, Any]) -> str:
    """Return words that prompt and seed decide."""
    digest = hashlib.sha256(json.dumps([body["messages"], body["seed"]]).encode()).hexdigest()
    return " ".join(digest[start : start + 5] for start in range(0, 40, 5))


class Double:
    def __init__(self, write: Write = words_of, delay: float = 0.0):
        self.write, self.delay = write, delay
        self.finish: Callable[[str], str] = lambda text: "length" if text.endswith("...") else "stop"
        self.statuses: list[int] = []
        """Given to the next requests, one each, in place of an answer."""
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.bodies.append(body)
            if self.statuses:
                return self.statuses.pop(0), {"error": {"message": "not now"}}
        time.sleep(self.delay)
        if path.endswith("/rewards"):
            scores = [float(len(messages[-1]["content"])) for messages in body["messages"]]
            return 200, {"data": [{"index": at, "score": score} for at, score in enumerate(scores)]}
        text = self.write(body)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish(text)}
        usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        identity = {"model": "double-1", "system_fingerprint": "fp_7"}
        return 200, {"choices": [choice], "usage": usage, **identity}


@contextmanager
def serving(double: Double, port: int = 0) -> Iterator[str]:
    """Serve the double; yields its address, up to /v1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            double.keys.append(self.headers.get("authorization"))
            status, answer = double.answer(self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *unused: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
