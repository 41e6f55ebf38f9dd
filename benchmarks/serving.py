"""The gateway against a stub engine: what it adds to a request, and 10,000 requests of clients that behave badly.

    python benchmarks/serving.py overhead [--streams 16] [--requests 400]
    python benchmarks/serving.py cpu --against TREE [--requests 200] [--rounds 20]       an earlier commit's gateway beside this one
    python benchmarks/serving.py soak [--requests 10000]
    python benchmarks/serving.py worst [MODEL] [--seconds 300] [--streams 6]      the worst bodies of a fuzzer, and health checks
    python benchmarks/serving.py engines NAME=WORDS ... [--streams 1,4,8] [--rounds 3]      tokens/s and first token

The stub writes tokens at a fixed rate and runs in a process of its own, as the gateway does. `overhead` asks the stub, a relay
(a process that copies bytes between two sockets, the least that anything in between costs) and the gateway in turn, in one run.
A loaded machine delays each process that has to wake up; what is left of the difference between gateway and relay is the
gateway's own, and so is its CPU time. `cpu` asks the gateways of two trees in turn, in one run, with the same packages, and
prints the milliseconds of CPU time that a request takes of each. `soak` mixes requests that are good, dropped, read slowly, sent
slowly, too large, and wrong, and reads memory and open sockets of the gateway's process while it goes on. `worst` starts a real
`dstune serve` (of a tiny model, where none is named), sends what takes a parser, a validator or a tokenizer longest from a process
of its own, and prints how long health checks and answers to another key took, and the memory of the gateway and of its engine.

`engines` starts a `dstune serve` for each of its arguments and asks them in turn: `local="MODEL --dtype float32 --threads 1"
llama="EXPORT-GGUF --engine llama.cpp --engine-python /path/to/llama-server -- --threads 1"`. Answers are greedy; their tokens are
those that the engine counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx2
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TOKENS = 60
RATE = 25.0
"""Tokens a second of one stream of the stub; a request of one word takes 1 / RATE."""


# -- processes --------------------------------------------------------------------------------------------------------


async def run_stub(folder: Path) -> None:
    from tests.support.serving import StubApp, listening

    async with listening(StubApp(1 / RATE)) as url:
        (folder / "stub.json").write_text(json.dumps({"url": url}))
        await asyncio.Event().wait()


class Relay(asyncio.Protocol):
    """One side of a connection that copies bytes to the other."""

    def __init__(self, other: Relay | None = None):
        self.other = other
        self.waiting: list[bytes] = []
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.other is None:
            asyncio.get_running_loop().create_task(self._connect())
        else:
            self.other.other = self
            for data in self.other.waiting:
                transport.write(data)

    async def _connect(self) -> None:
        host, port = Relay.stub.removeprefix("http://").split(":")
        await asyncio.get_running_loop().create_connection(lambda: Relay(self), host, int(port))

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self.waiting.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    stub = ""


async def run_relay(folder: Path) -> None:
    Relay.stub = json.loads((folder / "stub.json").read_text())["url"]
    server = await asyncio.get_running_loop().create_server(Relay, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    (folder / "relay.json").write_text(json.dumps({"url": f"http://127.0.0.1:{port}"}))
    await server.serve_forever()


async def run_gateway(folder: Path) -> None:
    import socket

    from dstune.serve.engines.base import Limits
    from dstune.serve.fleet import Fleet
    from dstune.serve.gateway.app import Gateway
    from dstune.serve.gateway.recording import Recorder
    from dstune.serve.gateway.routes import ROUTES
    from dstune.serve.gateway.settings import Settings
    from dstune.serve.server import Server, make_config, serve_until_signalled
    from dstune.serve.store.database import Database
    from tests.support.serving import StubEngine, stub_source

    url = json.loads((folder / "stub.json").read_text())["url"]
    database = Database.open_folder(folder)
    fleet = Fleet(lambda source, base: StubEngine(source, base, folder, folder, Limits(), url=url))
    await fleet.start([stub_source("first")])
    recorder = Recorder(database)
    settings = Settings(body_seconds=1.0, send_seconds=2.0, max_body_bytes=65536, concurrent=64, queue=10_000)
    gateway = Gateway(fleet, database, settings, recorder, ROUTES)
    key = gateway.keys.add("benchmark", admin=True)
    recorder.start()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    config = make_config(gateway, timeout_graceful_shutdown=10)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    (folder / "gateway.json").write_text(json.dumps({"url": address, "key": key}))
    await serve_until_signalled(Server(config), gateway, 0.0, [listening])
    await recorder.stop()
    await fleet.stop()


class Processes:
    def __init__(self, *roles: str, tree: Path = ROOT, stub: str = "") -> None:
        """tree: whose gateway it is. stub: the address of one that runs already."""
        self.folder = Path(tempfile.mkdtemp(prefix="dstune-serving-"))
        self.folder.chmod(0o700)
        self._tree = tree
        if stub:
            (self.folder / "stub.json").write_text(json.dumps({"url": stub}))
        self.running = {role: self._start(role) for role in roles}

    def _start(self, role: str) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        command = [sys.executable, str(self._tree / "benchmarks" / "serving.py"), role, str(self.folder)]
        environment = os.environ | {"PYTHONPATH": str(self._tree)}
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        written = self.folder / f"{role}.json"
        while not written.exists() or not written.read_text():
            assert process.poll() is None, f"the {role} ended"
            time.sleep(0.05)
        return process, json.loads(written.read_text())

    def url(self, role: str) -> str:
        return str(self.running[role][1]["url"])

    def of(self, role: str) -> psutil.Process:
        return psutil.Process(self.running[role][0].pid)

    def client(self, role: str, **options: Any) -> httpx2.AsyncClient:
        headers = {"authorization": f"Bearer {self.running[role][1].get('key', 'none')}"}
        # Servers close idle connections after 5 s.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=3.0)
        timeout = httpx2.Timeout(120)
        return httpx2.AsyncClient(
            base_url=self.url(role), headers=headers, limits=limits, timeout=timeout, trust_env=False, **options
        )

    def cpu_seconds(self, role: str) -> float:
        times = self.of(role).cpu_times()
        return float(times.user + times.system)

    def stop(self) -> int:
        """Stop the gateway and all engines; returns the exit code of the gateway."""
        gateway = self.running.pop("gateway")[0]
        gateway.send_signal(signal.SIGTERM)
        code = gateway.wait(30)
        for process, _ in self.running.values():
            process.kill()
            process.wait()
        return code


def body(words: int = TOKENS, **changes: Any) -> dict[str, Any]:
    text = " ".join(f"w{number}" for number in range(words))
    return {"model": "first", "messages": [{"role": "user", "content": text}], **changes}


# -- what the gateway adds --------------------------------------------------------------------------------------------


ROLES = ("stub", "relay", "gateway")


async def overhead(streams: int, requests: int, rounds: int = 4) -> dict[str, Any]:
    processes = Processes(*ROLES)
    seconds: dict[str, list[float]] = {role: [] for role in ROLES}
    rates: dict[str, list[float]] = {role: [] for role in ROLES}
    cpu = {role: {"request": 0.0, "token of a stream": 0.0} for role in ROLES}
    try:
        async with AsyncExitStack() as stack:
            clients = {role: await stack.enter_async_context(processes.client(role)) for role in ROLES}
            for role in ROLES:
                await _seconds(clients[role])
            order = list(ROLES)
            for _ in range(requests):  # one after the other, a word: what a request costs
                random.shuffle(order)
                for role in order:
                    seconds[role].append(await _seconds(clients[role]))
            for role in ROLES[1:]:  # by themselves: the relay's requests are the stub's too
                used = [processes.cpu_seconds(process_name) for process_name in ("stub", role)]
                for _ in range(requests):
                    await _seconds(clients[role])
                for process_name, cpu_before in zip(("stub", role), used, strict=True):
                    cpu[process_name]["request"] = 1000 * (processes.cpu_seconds(process_name) - cpu_before) / requests
            for _ in range(rounds):
                for role in ROLES:
                    used = [processes.cpu_seconds(role)]
                    rates[role].append(await _throughput(clients[role], streams))
                    used.append(processes.cpu_seconds(role))
                    cpu[role]["token of a stream"] += 1000 * (used[1] - used[0]) / (rounds * streams * TOKENS)
    finally:
        processes.stop()

    def added(role: str, other: str) -> dict[str, float]:
        differences = [1000 * (first - second) for first, second in zip(seconds[role], seconds[other], strict=True)]
        return {"median": statistics.median(differences), "p95": statistics.quantiles(differences, n=20)[-1]}

    throughput = {role: statistics.median(values) for role, values in rates.items()}
    return {
        "load": os.getloadavg()[0],
        "request_ms": {role: 1000 * statistics.median(values) for role, values in seconds.items()},
        "added_ms": {
            "relay to stub": added("relay", "stub"),
            "gateway to stub": added("gateway", "stub"),
            "gateway to relay": added("gateway", "relay"),
        },
        "cpu_ms": cpu,
        "streams": streams,
        "tokens_per_second": throughput,
        "throughput_lost": {role: 1 - throughput[role] / throughput["stub"] for role in ROLES[1:]},
    }


async def _seconds(client: httpx2.AsyncClient, words: int = 1) -> float:
    began = time.perf_counter()
    answer = await client.post("/v1/chat/completions", json=body(words))
    assert answer.status_code == 200
    return time.perf_counter() - began


async def _throughput(client: httpx2.AsyncClient, streams: int) -> float:
    async def one() -> int:
        count = 0
        async with client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as answer:
            async for line in answer.aiter_lines():
                count += line.startswith("data: {")
        return count

    began = time.perf_counter()
    counts = await asyncio.gather(*(one() for _ in range(streams)))
    assert counts == [TOKENS] * streams
    return sum(counts) / (time.perf_counter() - began)


async def cpu(tree: Path, requests: int, rounds: int) -> dict[str, Any]:
    """Compare CPU time of a request's gateway, in ms: that of the tree, of this one, and what this one takes more."""
    new = Processes("stub", "gateway")
    old = Processes("gateway", tree=tree.resolve(), stub=new.url("stub"))
    sides, used = {"old": old, "new": new}, {"old": [], "new": []}
    try:
        async with old.client("gateway") as first, new.client("gateway") as second:
            clients = {"old": first, "new": second}
            for number in range(rounds + 1):
                for side in random.sample(list(sides), 2):
                    cpu_before = sides[side].cpu_seconds("gateway")
                    for _ in range(requests):
                        await _seconds(clients[side], 0)
                    if number:  # the first round is a warm-up
                        used[side].append(1000 * (sides[side].cpu_seconds("gateway") - cpu_before) / requests)
    finally:
        old.stop()
        new.stop()
    differences = [later - cpu_before for cpu_before, later in zip(used["old"], used["new"], strict=True)]
    margin = 2 * statistics.stdev(differences) / len(differences) ** 0.5
    mean = statistics.mean(differences)
    return {
        "load": os.getloadavg()[0],
        "requests": requests * rounds,
        "cpu_ms": {side: statistics.mean(values) for side, values in used.items()},
        "more_ms": {"mean": mean, "interval": [mean - margin, mean + margin]},
    }


# -- clients that behave badly ----------------------------------------------------------------------------------------


async def soak(requests: int, seed: int = 0) -> dict[str, Any]:
    processes, choose = Processes("stub", "gateway"), random.Random(seed)
    gateway = processes.of("gateway")
    count_by_answer: dict[str, int] = {}
    memory: list[tuple[int, float]] = []
    places = asyncio.Semaphore(48)
    done = 0

    async with processes.client("gateway") as client:

        async def good(stream: bool) -> str:
            words = choose.randint(1, 5)
            if not stream:
                answer = await client.post("/v1/chat/completions", json=body(words))
                assert answer.json()["choices"][0]["message"]["content"].split()[-1] == f"w{words - 1}"
                return str(answer.status_code)
            async with client.stream("POST", "/v1/chat/completions", json=body(words, stream=True)) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            assert len(lines) == words + 1
            return str(answer.status_code)

        async def dropped(stream: bool) -> str:
            task = asyncio.ensure_future(client.post("/v1/chat/completions", json=body(200, stream=stream)))
            await asyncio.sleep(choose.uniform(0, 0.1))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return "left"

        async def slow_reader() -> str:
            host, port = client.base_url.host, client.base_url.port
            reader, writer = await asyncio.open_connection(host, port, limit=1)
            text = json.dumps(body(5, stream=True)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            head += f"Authorization: {client.headers['authorization']}\r\nContent-Length: {len(text)}\r\n\r\n"
            writer.write(head.encode() + text)
            await asyncio.sleep(0.3)
            status = (await reader.read(12)).decode()[-3:]
            writer.close()
            return status

        async def slow_body() -> str:
            async def parts() -> Any:
                yield b'{"model": '
                await asyncio.sleep(3)
                yield b'"first"}'

            headers = {"content-type": "application/json"}
            return str((await client.post("/v1/chat/completions", content=parts(), headers=headers)).status_code)

        async def large() -> str:
            headers = {"content-type": "application/json"}
            try:
                answer = await client.post("/v1/chat/completions", content=b"x" * 100_000, headers=headers)
            except httpx2.HTTPError:  # refused by its length, and the connection closed while it was being sent
                return "413"
            return str(answer.status_code)

        async def wrong() -> str:
            return str((await client.post("/v1/chat/completions", json=body(1, temperature=9))).status_code)

        kinds = {
            "good": (lambda: good(False), 40, {"200"}),
            "stream": (lambda: good(True), 20, {"200"}),
            "dropped": (lambda: dropped(False), 12, {"left"}),
            "dropped stream": (lambda: dropped(True), 12, {"left"}),
            "slow reader": (slow_reader, 4, {"200"}),
            "slow body": (slow_body, 2, {"408", "400"}),
            "large": (large, 5, {"413"}),
            "wrong": (wrong, 5, {"400"}),
        }
        names, weights = list(kinds), [weight for _, weight, _ in kinds.values()]

        async def one(name: str) -> None:
            nonlocal done
            async with places:
                run, _, expected = kinds[name]
                outcome = await run()
                count_by_answer[f"{name}: {outcome}"] = count_by_answer.get(f"{name}: {outcome}", 0) + 1
                assert outcome in expected, (name, outcome)
                done += 1
                if done % max(requests // 20, 1) == 0:
                    memory.append((done, gateway.memory_info().rss / 2**20))

        try:
            await asyncio.gather(*(one(name) for name in choose.choices(names, weights, k=requests)))
            await asyncio.sleep(3)
            text = (await client.get("/metrics")).text
            active = next(
                float(line.split()[1]) for line in text.splitlines() if line.startswith("dstune_active_requests ")
            )
            await client.aclose()
            await asyncio.sleep(0.5)
            sockets = [one for one in gateway.net_connections() if one.status == psutil.CONN_ESTABLISHED]
            stub_port = int(processes.url("stub").rpartition(":")[2])
            of_clients = [one for one in sockets if one.raddr and one.raddr.port != stub_port]
        finally:
            code = processes.stop()
    settled = [mib for number, mib in memory if number >= requests // 4]
    return {
        "requests": requests,
        "answers": dict(sorted(count_by_answer.items())),
        "active_after": active,
        "client_sockets_after": len(of_clients),
        "memory_mib": {"after a quarter": settled[0], "end": settled[-1], "largest": max(settled)},
        "exit_code": code,
    }


# -- real engines -----------------------------------------------------------------------------------------------------


class Served:
    """A `dstune serve` of its own."""

    def __init__(self, name: str, words: str, folder: Path):
        self.state = folder / name
        argv = [sys.executable, "-m", "dstune", "serve", "--port", "0", "--state", str(self.state), *shlex.split(words)]
        with (folder / f"{name}.log").open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            url, serves, models = line.strip().partition("/v1  serves ")
            if serves:
                self.url, self.model = url, models.split(", ")[0]
                return
        raise SystemExit(f"{name} did not start: {folder / f'{name}.log'}")

    def client(self) -> httpx2.AsyncClient:
        headers = {"authorization": f"Bearer {(self.state / 'key').read_text().strip()}"}
        return httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=600, trust_env=False)

    async def stream(self, client: httpx2.AsyncClient, tokens: int) -> tuple[float, int]:
        """Return seconds to the first text, and tokens of the answer."""
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Tell me about the sea."}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, first, count = time.perf_counter(), 0.0, 0
        async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if not first and any(choice["delta"].get("content") for choice in event.get("choices", [])):
                    first = time.perf_counter() - began
                if event.get("usage"):
                    count = event["usage"]["completion_tokens"]
        return first, count


WORST_BYTES = (8 << 20) - 512


def worst_bodies(choose: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield bodies without end, in no order: what takes longest for its size, and what a fuzzer makes of each route's requests."""
    from benchmarks import fuzz_serve

    def filled(start: bytes, part: bytes, end: bytes) -> bytes:
        return start + part * ((WORST_BYTES - len(start) - len(end)) // len(part)) + end

    def text(part: bytes) -> bytes:
        return filled(b'{"model": "m", "messages": [{"role": "user", "content": "', part, b'"}]}')

    values = (
        b"[],",
        b"{},",
        b"[[[]]],",
        b'"",',
        b"1,",
        b"1e5,",
        b'{"a":1},',
        b'[{"a":[]}],',
        b'"\\u0101",',
        b"12345678901234567890,",
    )
    texts = (b"w1 ", b"<|im_end|>", b"\\n", b"\\u0041", b'\\"', b"[{", b" ", b"a", "\U0001f600".encode(), b"\\ud800")
    names = b",".join(b'"%x":1' % number for number in range(90_000))
    call = b'{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{%s}"}},'
    calls = b'{"model": "m", "messages": [{"role": "assistant", "tool_calls": ['
    fixed = [
        *(filled(b'{"model": "m", "prompt": [', part, b"0]}") for part in values),
        *map(text, texts),
        filled(b"", b"[", b""),
        filled(b'{"a": ', b'{"a": ', b""),
        filled(b"", b'"', b""),
        b'{"model": "m", "metadata": {' + names + b"}}",
        b'{"model": "m", "prompt": [' + b"[1]," * 99_000 + b"[1]]}",
        b'{"model": "m", "prompt": [' + b"1," * 490_000 + b"1]}",
        b'{"model": "m", "stop": ["a"], "messages": [' + b'{"role": "user", "content": "a"},' * 2048 + b"0]}",
        filled(calls, call % (b'\\"a\\": [' + b"[]," * 900 + b"1]"), b"0]}]}"),
        filled(b'{"model": "m", "input": [', b'"%s",' % (b"w1 " * 1300), b'"a"]}'),
    ]
    while True:
        if choose.random() < 0.5:
            yield choose.choice(list(fuzz_serve.BODIES)), choose.choice(fixed)
        else:
            yield fuzz_serve.request(choose)


async def send_worst(url: str, key: str, model: str, seconds: float, streams: int) -> None:
    """Send the worst bodies to the server from a process of its own."""
    ends, counts = time.monotonic() + seconds, dict[str, int]()

    async def one(number: int) -> None:
        bodies = worst_bodies(random.Random(number))
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=120, trust_env=False) as client:
            while time.monotonic() < ends:
                path, content = next(bodies)
                try:
                    sent = content.replace(b'"model": "m"', b'"model": "%s"' % model.encode())
                    outcome = str((await client.post(path, content=sent)).status_code)
                except httpx2.HTTPError as error:
                    outcome = type(error).__name__
                counts[outcome] = counts.get(outcome, 0) + 1

    await asyncio.gather(*map(one, range(streams)))
    print(json.dumps(counts))


async def worst(words: str, seconds: float, streams: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="dstune-serving-"))
    if not words:
        from tests.support.tiny import save_decoder

        words = str(save_decoder(folder / "tiny"))
    server = Served("worst", words, folder)
    process = psutil.Process(server.process.pid)

    def memory() -> dict[str, float]:
        engines = process.children(recursive=True)
        return {
            "gateway": process.memory_info().rss / 2**20,
            "engine": sum(engine.memory_info().rss for engine in engines) / 2**20,
        }

    sizes: list[dict[str, float]] = []
    seconds_before: list[float] = []
    health: list[float] = []
    others: list[float] = []
    admin = (server.state / "admin-key").read_text().strip()  # another key than that of the attack
    request = {"model": server.model, "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 2}
    try:
        async with server.client() as client:
            for _ in range(20):  # what is loaded at first use
                assert (await client.post("/v1/chat/completions", json=request)).status_code == 200
            key = client.headers["authorization"].removeprefix("Bearer ")
            seconds_before += [await _health_seconds(client) for _ in range(200)]  # what the machine itself delays
            sizes.append(memory())
            attack = [sys.executable, __file__, "send-worst", server.url, key, server.model, str(seconds), str(streams)]
            sending = subprocess.Popen(attack, stdout=subprocess.PIPE, text=True)
            client.headers["authorization"] = f"Bearer {admin}"
            while sending.poll() is None:
                health.append(await _health_seconds(client))
                if len(health) % 20 == 0:
                    began = time.perf_counter()
                    assert (await client.post("/v1/chat/completions", json=request)).status_code == 200
                    others.append(time.perf_counter() - began)
                if len(health) % 100 == 0:
                    sizes.append(memory())
            await asyncio.sleep(2)
            sizes.append(memory())
    finally:
        server.process.terminate()
        server.process.wait(60)

    assert sending.stdout is not None
    answers = json.loads(sending.stdout.read())
    tenth = max(len(sizes) // 10, 1)
    return {
        "load": os.getloadavg()[0],
        "health_seconds": {"before": _told(seconds_before), "meanwhile": _told(health)},
        "other_key_seconds": _told(others),
        "mib": {name: [round(one[name]) for one in sizes[::tenth]] for name in sizes[0]},
        "answers": answers,
    }


async def _health_seconds(client: httpx2.AsyncClient) -> float:
    await asyncio.sleep(0.05)
    began = time.perf_counter()
    assert (await client.get("/healthz")).status_code == 200
    return time.perf_counter() - began


def _told(values: list[float]) -> dict[str, float]:
    p99 = statistics.quantiles(values, n=100)[-1]
    return {"count": len(values), "median": statistics.median(values), "p99": p99, "most": max(values)}


async def engines(commands: list[str], streams: list[int], rounds: int, tokens: int = 24) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="dstune-serving-"))
    servers: dict[str, Served] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    firsts: dict[tuple[str, int], list[float]] = {}
    try:
        async with AsyncExitStack() as stack:
            clients = {}
            for command in commands:
                name, _, words = command.partition("=")
                servers[name] = Served(name, words, folder)
                clients[name] = await stack.enter_async_context(servers[name].client())
                await servers[name].stream(clients[name], tokens)  # what is compiled or cached at first use
            for number in streams * rounds:
                for name, server in servers.items():
                    began = time.perf_counter()
                    answers = await asyncio.gather(*(server.stream(clients[name], tokens) for _ in range(number)))
                    seconds = time.perf_counter() - began
                    rates.setdefault((name, number), []).append(sum(count for _, count in answers) / seconds)
                    firsts.setdefault((name, number), []).append(statistics.median(first for first, _ in answers))
    finally:
        for server in servers.values():
            server.process.terminate()
            server.process.wait(60)
    figures = {
        name: {
            str(number): {
                "tokens_per_second": statistics.median(rates[name, number]),
                "of_rounds": sorted(rates[name, number]),
                "first_token_seconds": statistics.median(firsts[name, number]),
            }
            for number in streams
        }
        for name in servers
    }
    return {"load": os.getloadavg()[0], "rounds": rounds, "tokens": tokens, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "cpu", "soak", "worst", "send-worst", "engines", *ROLES))
    parser.add_argument("given", nargs="*")
    parser.add_argument("--streams")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--against", type=Path, metavar="TREE", help="of an earlier commit")
    arguments = parser.parse_args()
    if arguments.what in ROLES:
        from dstune.serve.server import run

        run({"stub": run_stub, "relay": run_relay, "gateway": run_gateway}[arguments.what](Path(*arguments.given)))
        return
    if arguments.what == "overhead":
        result = asyncio.run(overhead(int(arguments.streams or 16), arguments.requests or 400))
    elif arguments.what == "cpu":
        result = asyncio.run(cpu(arguments.against, arguments.requests or 200, arguments.rounds or 20))
    elif arguments.what == "worst":
        result = asyncio.run(worst(" ".join(arguments.given), arguments.seconds, int(arguments.streams or 6)))
    elif arguments.what == "send-worst":
        url, key, model, seconds, streams = arguments.given
        asyncio.run(send_worst(url, key, model, float(seconds), int(streams)))
        return
    elif arguments.what == "soak":
        result = asyncio.run(soak(arguments.requests or 10_000))
    else:
        streams = [int(count) for count in (arguments.streams or "1,4,8").split(",")]
        result = asyncio.run(engines(arguments.given, streams, arguments.rounds or 3))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
