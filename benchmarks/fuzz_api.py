#!/usr/bin/env python3
"""Send made-up and damaged requests to every route of the fine-tuning API: each answer has to keep the contract.

usage: python benchmarks/fuzz_api.py [--requests 20000] [--seed 0] [--folder DIR] [--store URL]

The contract: an error is `{"error": {message, type, param, code}}`; nothing is a 422 or a 5xx; a 409 tells clients not to
repeat it; every answer has `x-request-id`; none has a traceback, a path of the server or a key in it; bodies are JSON. Prints
what was found, with the request, and how many answers of each status there were. Exit code 1: something was found.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote, unquote

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from dstune.serve.gateway.app import Gateway, Route

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, 2**63, 10**30, 10**400, "", " ", "a", "auto", "null", "${oc.env:HOME}",
    "../../etc/passwd",
    "a\0b", "a\r\nx: y", "😀" * 70, "\ud800", "x" * 5000, "'; DROP TABLE files; --", "%00", "%2F", "{{ item.x }}", [], {}, [None],
    {"type": "dpo"}, {"a": {"b": {"c": []}}}, ["a"] * 200, {"": ""}, "file-none", "ft:a:b:c:d", {"type": "multi"},
]  # fmt: skip
QUERIES = (
    "limit", "after", "order", "purpose", "metadata[a]", "metadata", "start_time", "group_by[]", "bucket_width", "page", "x",
    "project_id", "end_time", "event_types[]",
)  # fmt: skip
GRADER = {"type": "string_check", "name": "a", "input": "{{ item.a }}", "reference": "b", "operation": "eq"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/uploads": {"filename": "a", "purpose": "batch", "bytes": 3, "mime_type": "text/plain"},
    "/v1/uploads/{upload}/complete": {"part_ids": ["part_a"], "md5": "0"},
    "/v1/fine_tuning/alpha/graders/run": {"grader": GRADER, "model_sample": "a", "item": {"a": "b"}},
    "/v1/fine_tuning/alpha/graders/validate": {
        "grader": {"type": "multi", "name": "m", "graders": {"a": GRADER}, "calculate_output": "a ^ 2"}
    },
    "/v1/batches": {"input_file_id": "file-a", "endpoint": "/v1/embeddings", "completion_window": "24h", "metadata": {"a": "b"}},
    "/v1/webhook_endpoints": {"name": "a", "url": "https://example.invalid/", "event_types": ["batch.completed"]},
    "/v1/webhook_endpoints/{endpoint}": {"name": "a"},
    "/v1/webhook_endpoints/{endpoint}/test": {"event_type": "batch.completed"},
    "/v1/webhook_endpoints/{endpoint}/rotate_secret": {"keep_old_secret_active_for_24_hours": True},
    "/v1/secrets": {"name": "wandb", "value": "0123456789abcdef"},
    "/v1/fine_tuning/jobs": {
        "model": "tiny", "training_file": "file-a", "validation_file": None, "suffix": "a", "seed": 1, "metadata": {"a": "b"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        "integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}],
    },
}  # fmt: skip
PERMISSIONS = {"project_ids": ["proj_default"]}


@dataclass
class Sent:
    method: str
    path: str
    query: str
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def __str__(self) -> str:
        return f"{self.method} {self.path}?{self.query} {self.body[:600]!r}"


@dataclass
class Answered:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Broken(AssertionError):
    """An answer does not keep the contract."""


class Fuzzer:
    """keys: of callers, some of which exist; ids: of objects that exist, since most paths end at the first lookup."""

    def __init__(self, gateway: Gateway, keys: Sequence[str], folder: Path, seed: int):
        self.gateway, self.keys, self.folder, self.seed = gateway, keys, folder, seed
        self.random = Random(seed)
        """While requests are made, hypothesis's: of a finding, the smallest request that still breaks the contract is printed."""
        self.statuses: Counter[int] = Counter()
        self.ids: list[str] = ["file-none"]
        self.findings: dict[str, str] = {}
        """The last request by each fault."""

    async def run(self, count: int) -> None:
        """Send so many requests, from a thread: hypothesis calls what it tests."""
        loop = asyncio.get_running_loop()
        routes = [route for route in self.gateway.routes if route.path.startswith("/v1/")]

        @seed(self.seed)
        @settings(
            max_examples=count,
            phases=(Phase.generate, Phase.shrink),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.sampled_from(routes), st.randoms(use_true_random=False))
        def send(route: Route, random: Random) -> None:
            self.random = random
            self._check(asyncio.run_coroutine_threadsafe(self._answered(route), loop).result(30))

        try:
            await asyncio.to_thread(send)
        except Exception:
            if not self.findings:
                raise

    async def _answered(self, route: Route) -> tuple[Sent, Answered]:
        sent = self.made(route)
        return sent, await self.ask(sent)

    def _check(self, pair: tuple[Sent, Answered]) -> None:
        """Raises Broken."""
        sent, answered = pair
        self.statuses[answered.status] += 1
        if faults := self.faults(answered):
            for fault in faults:
                self.findings[fault] = f"{fault}: {sent} -> {answered.status} {answered.body[:300]!r}"
            raise Broken(faults[0])
        if not self.findings:  # what a smaller request is made of stays as it was
            for match in re.findall(rb'"id":\s?"([\w:-]{6,80})"', answered.body)[:1]:
                self.ids = [*self.ids[-200:], match.decode()]

    # -- requests

    def made(self, route: Route) -> Sent:
        pick = self.random
        path = re.sub(r"\{\w+\+?\}", lambda _: quote(self.segment(), safe=":"), route.path)
        query = ""
        if pick.random() < 0.4:
            pairs = [(pick.choice(QUERIES), pick.choice(NASTY)) for _ in range(pick.randint(1, 3))]
            query = "&".join(f"{quote(name)}={quote(str(value).encode('utf-8', 'replace'))}" for name, value in pairs)
        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {pick.choice(self.keys)}".encode())]
        kind, body = b"application/json", b""
        if route.method == "POST":
            kind, body = self.content(route)
            headers.append((b"content-type", kind))
        headers.append((b"content-length", str(len(body)).encode()))
        extra = (
            (b"idempotency-key", b"a"), (b"idempotency-key", b"\xff"), (b"x-stainless-retry-count", b"1"),
            (b"x-stainless-retry-count", b"\xb2"), (b"x-stainless-read-timeout", b"nan"), (b"openai-project", b"x"),
            (b"content-encoding", b"gzip"), (b"expect", b"100-continue"), (b"content-length", b"5"), (b"host", b"evil.example"),
        )  # fmt: skip
        if pick.random() < 0.15:
            headers.append(pick.choice(extra))
        method = (
            route.method if pick.random() < 0.95 else pick.choice(("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD"))
        )
        return Sent(method, path, query, headers, body)

    def segment(self) -> str:
        if self.random.random() < 0.6:
            return self.random.choice(self.ids)
        text = str(
            self.random.choice([nasty for nasty in NASTY if isinstance(nasty, str) and nasty] + ["a/b", "ft:x/y::z"])
        )
        return text.encode("utf-8", "replace").decode()[:300]

    def content(self, route: Route) -> tuple[bytes, bytes]:
        pick = self.random
        if route.path in ("/v1/files", "/v1/uploads/{upload}/parts"):
            return self.form("file" if route.path == "/v1/files" else "data")
        example = BODIES.get(route.path, PERMISSIONS if route.path.endswith("permissions") else {})
        value: Any = self.changed(json.loads(json.dumps(example)))
        body = json.dumps(value).encode()
        chance = pick.random()
        if chance < 0.05:
            body = body[: pick.randrange(len(body) + 1)]
        elif chance < 0.08:
            body = bytes(pick.randrange(256) for _ in range(40))
        elif chance < 0.1:
            body = b"[" * 3000
        elif chance < 0.12:
            body = b""
        return pick.choice((b"application/json",) * 9 + (b"text/plain", b"", b"application/json; charset=x")), body

    def changed(self, value: Any) -> Any:
        """Return the value with one or a few of its parts replaced, removed or added."""
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 4))):
            value = self._changed(value)
        return value

    def _changed(self, value: Any) -> Any:
        pick = self.random
        if isinstance(value, dict) and value and pick.random() < 0.85:
            name = pick.choice(list(value))
            chance = pick.random()
            if chance < 0.15:
                del value[name]
            elif chance < 0.3:
                value[str(pick.choice(("x", "", "a\0", "😀", "model", "__class__")))] = deepcopy(pick.choice(NASTY))
            elif chance < 0.4:
                return {**value, name: self.ids[-1]}
            else:
                value[name] = self._changed(value[name])
            return value
        if isinstance(value, list) and value and pick.random() < 0.7:
            value[pick.randrange(len(value))] = self._changed(value[0])
            return value
        return deepcopy(pick.choice(NASTY))

    def form(self, file: str) -> tuple[bytes, bytes]:
        pick = self.random
        content = pick.choice((b"x" * 10, b"", b"--b--", b"\r\n--b\r\n", bytes(range(256)), b'{"messages": []}\n' * 20))
        parts = [("purpose", pick.choice(("fine-tune", "batch", "batch", "vision", "", "\0")).encode(), None)]
        parts.append((file, content, str(pick.choice([nasty for nasty in NASTY if isinstance(nasty, str)]))))
        if pick.random() < 0.4:
            names = ("expires_after[anchor]", "expires_after[seconds]", "purpose", file, "x", "")
            parts.append(
                (pick.choice(names), str(pick.choice(NASTY)).encode("utf-8", "replace"), pick.choice((None, "a")))
            )
        pick.shuffle(parts)
        body = b""
        for name, value, filename in parts:
            disposition = f'; filename="{filename}"'.encode("utf-8", "replace") if filename is not None else b""
            body += (
                b'--b\r\nContent-Disposition: form-data; name="'
                + name.encode()
                + b'"'
                + disposition
                + b"\r\n\r\n"
                + value
                + b"\r\n"
            )
        body += b"--b--\r\n"
        chance = pick.random()
        if chance < 0.1:
            body = body[: pick.randrange(len(body))]
        elif chance < 0.15:
            at = pick.randrange(len(body))
            body = body[:at] + bytes([pick.randrange(256)]) + body[at + 1 :]
        kinds = (b"multipart/form-data; boundary=b",) * 12 + (
            b"multipart/form-data", b"multipart/form-data; boundary=" + b"c" * 300, b"application/json",
            b'multipart/form-data; boundary="b', b"multipart/mixed; boundary=b",
        )  # fmt: skip
        return pick.choice(kinds), body

    # -- answers

    async def ask(self, sent: Sent) -> Answered:
        answered, parts = Answered(), [sent.body]

        async def receive() -> Any:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            return await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answered.status = message["status"]
                answered.headers = {
                    name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]
                }
            answered.body += message.get("body", b"")

        scope = {
            "type": "http", "method": sent.method, "path": unquote(sent.path), "query_string": sent.query.encode(),
            "headers": sent.headers,
        }  # fmt: skip
        async with asyncio.timeout(20):
            await self.gateway(scope, receive, send)
        return answered

    def faults(self, answered: Answered) -> list[str]:
        faults = []
        if answered.status in (0, 422) or answered.status >= 500:
            faults.append("status")
        if not answered.headers.get("x-request-id", "").startswith("req_"):
            faults.append("no x-request-id")
        if answered.status == 409 and answered.headers.get("x-should-retry") != "false":
            faults.append("a 409 that is repeated")
        if any("\n" in value or "\r" in value for value in answered.headers.values()):
            faults.append("a header of several lines")
        text = answered.body.decode("utf-8", "replace")
        if any(word in text for word in ("Traceback", str(self.folder), "site-packages", *self.keys)):
            faults.append("it tells what it must not")
        if answered.headers.get("content-type", "").startswith("application/json"):
            try:
                value = json.loads(text)
            except ValueError:
                return [*faults, "no JSON"]
            if "detail" in value:
                faults.append("detail")
            error = value.get("error") if answered.status >= 400 else None
            if answered.status >= 400 and (
                set(value) != {"error"} or set(error) != {"message", "type", "param", "code"} or not error["message"]
            ):
                faults.append("the shape of an error")
        elif answered.status >= 400:
            faults.append("an error that is no JSON")
        return faults


async def main(count: int, seed: int, folder: Path, store: str) -> int:
    from dstune.serve.store.database import Database
    from tests.support.finetuning import cloud

    async with cloud(folder, database=Database(store) if store else None) as server:
        keys = [server.key, server.owner, server.owner, server.admin, server.other, server.reader, "nothing"]
        fuzzer = Fuzzer(server.gateway, keys, folder, seed)
        await fuzzer.run(count)
    for finding in fuzzer.findings.values():
        print(finding)
    print(
        json.dumps({"requests": count, "seed": seed, "found": len(fuzzer.findings), "statuses": dict(fuzzer.statuses)})
    )
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--store", default="", metavar="URL", help="of an empty database, where it is not SQLite")
    arguments = parser.parse_args()
    place = arguments.folder or Path(tempfile.mkdtemp(prefix="dstune-fuzz-"))
    place.mkdir(exist_ok=True)
    sys.exit(asyncio.run(main(arguments.requests, arguments.seed, place, arguments.store)))
