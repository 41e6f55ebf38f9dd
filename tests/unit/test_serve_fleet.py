"""Engines that are killed, that do not start, and that end with the server."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from dstune.core.errors import UserError
from dstune.serve.engines.base import EngineDown, Limits
from dstune.serve.fleet import Fleet
from tests.support.serving import ProcessEngine, StubEngine, chat, served, stub_source


async def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)


def test_an_engine_that_is_killed_under_load_is_started_again(tmp_path):
    """Every request is answered by the engine, or refused with 503 and a time to try again."""

    async def test():
        async with served(tmp_path, names=["first"], seconds=0.01, process=True) as found:
            client = found.client()
            engine = found.fleet.models["first"].engine
            for number in range(2):
                posts = [client.post("/v1/chat/completions", json=chat("a b c")) for _ in range(24)]
                tasks = [asyncio.create_task(post) for post in posts]
                await asyncio.sleep(0.03)
                os.killpg(engine.process.pid, signal.SIGKILL)
                for answer in await asyncio.gather(*tasks):
                    assert answer.status_code in (200, 503), answer.text
                    if answer.status_code == 200:
                        assert answer.json()["choices"][0]["message"]["content"] == "a b c"
                    else:
                        assert answer.headers["retry-after"]
                await until(lambda count=number + 2: not found.fleet.ready or engine.starts == count)
                await until(lambda: found.fleet.ready)
                assert (await client.post("/v1/chat/completions", json=chat("a b"))).status_code == 200
            assert found.fleet.restarts() == {"first": 2}

    asyncio.run(test())


def test_a_stream_that_is_cut_does_not_look_complete(tmp_path):
    import httpx2

    async def test():
        async with served(tmp_path, names=["first"], seconds=0.05, process=True) as found:
            lines: list[str] = []

            async def read() -> None:
                async with found.client().stream(
                    "POST", "/v1/chat/completions", json=chat("w " * 100, stream=True)
                ) as answer:
                    async for line in answer.aiter_lines():
                        lines.append(line)
                        if len(lines) == 3:
                            os.killpg(found.fleet.models["first"].engine.process.pid, signal.SIGKILL)

            with pytest.raises(httpx2.RemoteProtocolError):
                await read()
            assert "data: [DONE]" not in lines

    asyncio.run(test())


def test_engines_end_with_the_server(tmp_path):
    async def test():
        async with served(tmp_path, names=["first"], process=True) as found:
            process = found.fleet.models["first"].engine.process
            assert process.poll() is None
        return process

    assert asyncio.run(test()).poll() is not None


def fleet_of(tmp_path, **given) -> Fleet:
    return Fleet(lambda source, base: StubEngine(source, base, tmp_path, tmp_path, Limits(), **given))


def test_a_fleet_that_cannot_start_says_why(tmp_path):
    with pytest.raises(EngineDown):
        asyncio.run(fleet_of(tmp_path, down=True).start([stub_source("a")]))
    with pytest.raises(UserError, match="two models have this name"):
        asyncio.run(fleet_of(tmp_path).start([stub_source("a"), stub_source("a")]))


def test_a_process_that_ends_at_once_shows_its_last_lines(tmp_path, monkeypatch):
    os.chmod(tmp_path, 0o700)
    engine = ProcessEngine(stub_source("a"), "a", tmp_path, tmp_path, Limits(), seconds="not a number")
    with pytest.raises(EngineDown, match="could not convert string to float"):
        asyncio.run(engine.start())
