"""A gateway over stub engines, in one event loop, for tests that need no model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx2

from dstune import protocols
from dstune.checkpoint.answer_files import digest_files
from dstune.serve.asgi import EVENTS, dumps, event, read_body, respond
from dstune.serve.engines.base import Command, Engine, EngineDown
from dstune.serve.engines.base import Limits as EngineLimits
from dstune.serve.engines.http import Upstream
from dstune.serve.engines.local.engine import CHAT, COMPLETION, ENCODER_ROUTES
from dstune.serve.engines.vllm import RESPONSE
from dstune.serve.fleet import Fleet
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.recording import Recorder
from dstune.serve.gateway.request_log import RequestLog
from dstune.serve.gateway.routes import ROUTES
from dstune.serve.gateway.settings import Settings
from dstune.serve.server import Server, make_config
from dstune.serve.source import Source
from dstune.serve.store.database import Database


def write_reference(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `reference.json` with these rows, and digests of the files that are in `folder`."""
    (folder / "reference.json").write_text(json.dumps({"format": 2, "files": digest_files(folder), "rows": list(rows)}))


class StubApp:
    """An engine that answers every request with the words of its last message, one a chunk."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.running = 0
        self.cancelled = 0
        self.finished = 0
        self.chunks = 0
        self.loaded: dict[str, str] = {}
        self.filler = ""
        self.pieces: list[str] = []
        """What it writes instead of the words, if any."""
        self.refusal = b""
        """What it answers with 400 to requests that ask for it, by the word `refuses`."""
        self.raw = b""
        """The bytes of its streams, if any."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = json.loads(await read_body(receive, 1 << 30) or b"{}")
        self.seen.append((scope["path"], body))
        if scope["path"] == "/v1/load_lora_adapter":
            self.loaded[body["lora_name"]] = body["lora_path"]
            await respond(send, 200, b"{}")
            return
        if "explode" in json.dumps(body):
            await respond(send, 500, b"Traceback: /etc/passwd")
            return
        if self.refusal and "refuses" in json.dumps(body):
            await respond(send, 400, self.refusal)
            return
        self.running += 1
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait_for(asyncio.shield(self._answer(body, send, gone)), None)
            self.finished += 1
        except ConnectionError:
            self.cancelled += 1
        finally:
            self.running -= 1
            gone.cancel()

    async def _answer(self, body: dict[str, Any], send: Any, gone: asyncio.Future[Any]) -> None:
        words = str((body.get("messages") or [{"content": body.get("prompt", "")}])[-1]["content"]).split()
        head = {
            "id": f"chatcmpl-{len(self.seen)}",
            "object": "chat.completion",
            "created": 1,
            "model": body.get("model"),
        }
        if not body.get("stream"):
            for _ in words:
                await self._pause(gone)
            text = "".join(self.pieces) or " ".join(words)
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
            await respond(send, 200, dumps(head | {"choices": [choice], "usage": usage}))
            return
        await send({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
        if self.raw:
            await send({"type": "http.response.body", "body": self.raw})
            return
        for word in self.pieces or words:
            await self._pause(gone)
            delta = {"index": 0, "delta": {"content": word + self.filler}, "finish_reason": None}
            await send({"type": "http.response.body", "body": event(head | {"choices": [delta]}), "more_body": True})
            self.chunks += 1
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
            told = event(head | {"choices": [], "usage": usage})
            await send({"type": "http.response.body", "body": told, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _pause(self, gone: asyncio.Future[Any]) -> None:
        await asyncio.wait({gone}, timeout=self.seconds or 0.0)
        if gone.done():
            raise ConnectionError


@asynccontextmanager
async def listening(app: Any, uds: Path | None = None) -> AsyncIterator[str]:
    """Run `app` behind uvicorn; yields the URL, or nothing where it listens on a Unix socket."""
    bound = socket.socket(socket.AF_UNIX if uds else socket.AF_INET, socket.SOCK_STREAM)
    bound.bind(str(uds) if uds else ("127.0.0.1", 0))
    bound.listen(2048)
    config = make_config(app, timeout_graceful_shutdown=5)
    server = Server(config)
    task = asyncio.create_task(server.serve([bound]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield "" if uds else f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        bound.close()


@dataclass
class StubEngine(Engine):
    """Speaks to an application in this process."""

    name: ClassVar[str] = "stub"
    starts_process: ClassVar[bool] = False
    url: str = ""
    uds: str | None = None
    own_routes: Mapping[str, frozenset[str]] | None = None
    down: bool = False

    @property
    def routes(self) -> Mapping[str, frozenset[str]]:
        encoders = {path: fields for kind in ENCODER_ROUTES.values() for path, fields in kind.items()}
        language = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/v1/responses": RESPONSE}
        return self.own_routes or language | encoders

    async def start(self) -> None:
        if self.down:
            raise EngineDown("the stub is down")
        self.starts += 1
        self.dtype, self.context = "float32", 2048
        self.client = Upstream(self.url, self.uds)

    def alive(self) -> bool:
        return not self.down

    async def ended(self) -> None:
        while self.alive():
            await asyncio.sleep(0.1)

    async def unload_adapter(self, name: str) -> None:
        return


@dataclass
class ProcessEngine(StubEngine):
    """The same in a process of its own, started and watched as a real engine is."""

    starts_process: ClassVar[bool] = True
    seconds: float = 0.0

    def command(self, folder: Path) -> Command:
        argv = [sys.executable, "-m", "tests.support.stub_process", str(folder / "http"), str(self.seconds)]
        # It imports nothing from where it is started.
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return Command(argv, environment, "http://engine", str(folder / "http"), b"\n")

    async def start(self) -> None:
        await Engine.start(self)
        self.dtype = "float32"

    def alive(self) -> bool:
        return Engine.alive(self)

    async def load_adapter(self, name: str, folder: Path) -> None:
        await Engine.load_adapter(self, name, folder)


def stub_source(name: str, **changes: Any) -> Source:
    defaults: dict[str, Any] = {"folder": None, "path": name, "task": "chat", "generates": True, "serves": ()}
    return Source(**{"name": name, "adapter": False, "base": name, **defaults, **changes})


@dataclass
class Served:
    """A gateway that listens, and what stands behind it."""

    url: str
    gateway: Gateway
    app: StubApp
    fleet: Fleet
    admin: str
    key: str
    other: str
    """Of another tenant, for whom there is the model `second` only."""
    folder: Path
    clients: list[httpx2.AsyncClient] = field(default_factory=list)

    def client(self, key: str | None = None, **headers: str) -> httpx2.AsyncClient:
        sent_headers = {"authorization": f"Bearer {self.key if key is None else key}"} | headers
        made = httpx2.AsyncClient(base_url=self.url, headers=sent_headers, timeout=30, trust_env=False)
        self.clients.append(made)
        return made


@asynccontextmanager
async def served(
    folder: Path,
    *,
    names: Sequence[str] = ("first", "second"),
    seconds: float = 0.0,
    log: RequestLog | None = None,
    routes: Mapping[str, frozenset[str]] | None = None,
    process: bool = False,
    **settings: Any,
) -> AsyncIterator[Served]:
    os.chmod(folder, 0o700)
    app, database = StubApp(seconds), Database.open_folder(folder)
    async with listening(app) as engine_url:
        short = Path(tempfile.mkdtemp(prefix="dstune-test-"))

        def engine(source: Source, base: str) -> StubEngine:
            place = (source, base, folder, short, EngineLimits(start_seconds=60))
            if process:
                return ProcessEngine(*place, own_routes=routes, seconds=seconds)
            return StubEngine(*place, url=engine_url, own_routes=routes)

        fleet = Fleet(engine)
        await fleet.start([stub_source(name) for name in names])
        recorder = Recorder(database, log)
        gateway = Gateway(fleet, database, Settings(**settings), recorder, ROUTES, closed=closed_paths())
        admin = gateway.keys.add("admin", admin=True)
        key, other = gateway.keys.add("one"), gateway.keys.add("two", models=["second"])
        recorder.start()
        async with listening(gateway) as url:
            server = Served(url, gateway, app, fleet, admin, key, other, folder)
            try:
                yield server
            finally:
                for client in server.clients:
                    await client.aclose()
        await recorder.stop()
        await fleet.stop()
        database.close()
        shutil.rmtree(short)


def closed_paths() -> dict[str, str]:
    """Return what opens the routes of wings, by the beginning of their paths."""
    return {path: option for kind in protocols.ROUTES.classes().values() for path, option in kind.closed.items()}


def chat(text: str = "hello there", **changes: Any) -> dict[str, Any]:
    return {"model": "first", "messages": [{"role": "user", "content": text}], **changes}


def run(test, tmp_path, **settings):
    """Return the result of `test(served)`."""

    async def main():
        async with served(tmp_path, **settings) as server:
            return await test(server)

    return asyncio.run(main())


async def until(check, seconds=60.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it does not come"
        await asyncio.sleep(0.02)
