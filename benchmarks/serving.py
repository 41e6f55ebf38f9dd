"""The gateway against a stub engine: what it adds to a request, and 10,000 requests of clients that behave badly.

    python benchmarks/serving.py overhead [--streams 16] [--requests 400]
    python benchmarks/serving.py soak [--requests 10000]
    python benchmarks/serving.py engine RUN [--streams 1,4,8]      tokens/s and first token of the local engine

The stub writes tokens at a fixed rate and runs in a process of its own, as the gateway does. `overhead` asks stub and gateway in
turn, in one run. `soak` mixes requests that are good, dropped, read slowly, sent slowly, too large, and wrong, and reads memory
and open sockets of the gateway's process while it goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

TOKENS = 60
RATE = 25.0
"""Tokens a second of one stream of the stub; a request of one word takes 1 / RATE."""


# -- processes --------------------------------------------------------------------------------------------------------


async def run_stub(folder: Path) -> None:
    from tests.support.serving import StubApp, listening

    async with listening(StubApp(1 / RATE)) as url:
        (folder / "stub.json").write_text(json.dumps({"url": url}))
        await asyncio.Event().wait()


async def run_gateway(folder: Path) -> None:
    import socket

    import uvicorn

    from dstune.serve.engines.base import Limits
    from dstune.serve.fleet import Fleet
    from dstune.serve.gateway.app import Gateway
    from dstune.serve.gateway.recording import Recorder
    from dstune.serve.gateway.routes import ROUTES
    from dstune.serve.gateway.settings import Settings
    from dstune.serve.server import Server, drained
    from dstune.serve.store.database import Database
    from tests.support.serving import StubEngine, stub_source

    url = json.loads((folder / "stub.json").read_text())["url"]
    database = Database.of_folder(folder)
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
    config = uvicorn.Config(
        gateway,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=10,
    )
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    (folder / "gateway.json").write_text(json.dumps({"url": address, "key": key}))
    await drained(Server(config), gateway, 0.0, [listening])
    await recorder.stop()
    await fleet.stop()


class Processes:
    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dstune-serving-"))
        self.folder.chmod(0o700)
        self.stub = self._start("stub")
        self.gateway = self._start("gateway")

    def _start(self, role: str) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        process = subprocess.Popen([sys.executable, __file__, role, str(self.folder)])
        told = self.folder / f"{role}.json"
        while not told.exists() or not told.read_text():
            assert process.poll() is None, f"the {role} ended"
            time.sleep(0.05)
        return process, json.loads(told.read_text())

    def client(self, name: str, **given: Any) -> httpx2.AsyncClient:
        told = (self.stub if name == "stub" else self.gateway)[1]
        headers = {"authorization": f"Bearer {told.get('key', 'none')}"}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx2.Timeout(120)
        return httpx2.AsyncClient(
            base_url=told["url"], headers=headers, limits=limits, timeout=timeout, trust_env=False, **given
        )

    def stop(self) -> int:
        self.gateway[0].send_signal(signal.SIGTERM)
        code = self.gateway[0].wait(30)
        self.stub[0].kill()
        self.stub[0].wait()
        return code


def body(words: int = TOKENS, **changes: Any) -> dict[str, Any]:
    text = " ".join(f"w{number}" for number in range(words))
    return {"model": "first", "messages": [{"role": "user", "content": text}], **changes}


# -- what the gateway adds --------------------------------------------------------------------------------------------


async def overhead(streams: int, requests: int) -> dict[str, Any]:
    processes = Processes()
    seconds: dict[str, list[float]] = {"stub": [], "gateway": []}
    rates: dict[str, list[float]] = {"stub": [], "gateway": []}
    try:
        async with processes.client("stub") as stub, processes.client("gateway") as gateway:
            clients = {"stub": stub, "gateway": gateway}
            for round_number in range(2 + requests):  # one after the other, a word: what a request costs
                for name in ("stub", "gateway") if round_number % 2 else ("gateway", "stub"):
                    began = time.perf_counter()
                    answer = await clients[name].post("/v1/chat/completions", json=body(1))
                    assert answer.status_code == 200
                    if round_number >= 2:
                        seconds[name].append(time.perf_counter() - began)
            used = [_cpu_seconds(processes)]
            for _ in range(requests):
                await gateway.post("/v1/chat/completions", json=body(1))
            used.append(_cpu_seconds(processes))
            for _ in range(4):
                for name, client in clients.items():
                    rates[name].append(await _throughput(client, streams))
            used.append(_cpu_seconds(processes))
    finally:
        processes.stop()
    added = [one - other for one, other in zip(seconds["gateway"], seconds["stub"], strict=True)]
    direct, through = statistics.median(rates["stub"]), statistics.median(rates["gateway"])
    return {
        "added_ms": {"median": 1000 * statistics.median(added), "p95": 1000 * statistics.quantiles(added, n=20)[-1]},
        "request_ms": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "gateway_cpu_ms": {
            "request": 1000 * (used[1] - used[0]) / requests,
            "token of a stream": 1000 * (used[2] - used[1]) / (4 * streams * TOKENS),
        },
        "load": os.getloadavg()[0],
        "streams": streams,
        "tokens_per_second": {"stub": direct, "gateway": through},
        "throughput_lost": 1 - through / direct,
    }


def _cpu_seconds(processes: Processes) -> float:
    times = psutil.Process(processes.gateway[0].pid).cpu_times()
    return float(times.user + times.system)


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


# -- clients that behave badly ----------------------------------------------------------------------------------------


async def soak(requests: int, seed: int = 0) -> dict[str, Any]:
    processes, choose = Processes(), random.Random(seed)
    gateway = psutil.Process(processes.gateway[0].pid)
    found: dict[str, int] = {}
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
                told = await run()
                found[f"{name}: {told}"] = found.get(f"{name}: {told}", 0) + 1
                assert told in expected, (name, told)
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
            stub_port = int(processes.stub[1]["url"].rpartition(":")[2])
            of_clients = [one for one in sockets if one.raddr and one.raddr.port != stub_port]
        finally:
            code = processes.stop()
    settled = [mib for number, mib in memory if number >= requests // 4]
    return {
        "requests": requests,
        "answers": dict(sorted(found.items())),
        "active_after": active,
        "client_sockets_after": len(of_clients),
        "memory_mib": {"after a quarter": settled[0], "end": settled[-1], "largest": max(settled)},
        "exit_code": code,
    }


# -- a real engine ----------------------------------------------------------------------------------------------------


async def engine(model: str, streams: list[int], tokens: int = 48) -> dict[str, Any]:
    """Of the local engine behind a real gateway, which has to run already: `dstune serve MODEL`."""
    key = Path(os.environ.get("DSTUNE_KEY_FILE", "serving/key")).read_text().strip()
    url = os.environ.get("DSTUNE_URL", "http://127.0.0.1:8000")
    result: dict[str, Any] = {}
    headers = {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=600, trust_env=False) as client:

        async def one() -> tuple[float, int]:
            asked = {
                "model": model,
                "messages": [{"role": "user", "content": "Tell me about the sea."}],
                "max_tokens": tokens,
                "temperature": 0,
                "stream": True,
                "logit_bias": {},
            }
            began, first, count = time.perf_counter(), 0.0, 0
            async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
                async for line in answer.aiter_lines():
                    if '"content"' in line and '"role"' not in line:
                        first, count = first or time.perf_counter() - began, count + 1
            return first, count

        await one()
        for number in streams:
            began = time.perf_counter()
            found = await asyncio.gather(*(one() for _ in range(number)))
            seconds = time.perf_counter() - began
            result[str(number)] = {
                "tokens_per_second": sum(count for _, count in found) / seconds,
                "first_token_seconds": statistics.median(first for first, _ in found),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "soak", "engine", "stub", "gateway"))
    parser.add_argument("path", nargs="?")
    parser.add_argument("--streams", default="16")
    parser.add_argument("--requests", type=int)
    arguments = parser.parse_args()
    if arguments.what in ("stub", "gateway"):
        asyncio.run((run_stub if arguments.what == "stub" else run_gateway)(Path(arguments.path)))
        return
    if arguments.what == "overhead":
        result = asyncio.run(overhead(int(arguments.streams), arguments.requests or 400))
    elif arguments.what == "soak":
        result = asyncio.run(soak(arguments.requests or 10_000))
    else:
        result = asyncio.run(engine(arguments.path, [int(one) for one in arguments.streams.split(",")]))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
