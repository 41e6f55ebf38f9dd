"""The way to an engine, and what is passed on of its answers."""

from __future__ import annotations

import asyncio

import pytest

from dstune.serve.asgi import ClientGone, read_body, respond, while_connected
from dstune.serve.engines.http import FAILURES, Upstream
from tests.support.serving import chat, listening, served


async def app(scope, receive, send):
    if scope["path"] == "/moved":
        await respond(send, 307, b"", [(b"location", b"/secret")])
        return
    body = await read_body(receive, 1 << 20)
    seen = {name.decode(): value.decode() for name, value in scope["headers"]}
    text = (
        f"{scope['method']} {scope['path']} {body.decode()} {seen.get('accept-encoding')} {seen.get('authorization')}"
    )
    await respond(send, 200, text.encode())


def test_what_an_engine_is_asked(tmp_path):
    async def main():
        async with listening(app) as url, listening(app, tmp_path / "s"):
            for upstream in (
                Upstream(url, headers={"authorization": "Bearer k"}),
                Upstream("http://engine/", str(tmp_path / "s"), {"authorization": "Bearer k"}),
            ):
                assert await upstream.ask("POST", "/a", b"{}") == (200, b"POST /a {} identity Bearer k")
                assert await upstream.ask("GET", "/b%2Fc") == (200, b"GET /b/c  identity Bearer k")
                # An address elsewhere, to which the key would go, is not followed.
                assert (await upstream.ask("POST", "/moved", b"{}"))[0] == 307
                await upstream.close()
                assert upstream.closed
            nobody = Upstream("http://127.0.0.1:9")
            with pytest.raises(FAILURES):
                await nobody.ask("GET", "/")
            await nobody.close()

    asyncio.run(main())


def test_an_engine_that_compresses_is_refused(tmp_path):
    """Its bytes are passed on as they are, and nobody would unpack them."""

    async def main():
        async with served(tmp_path, names=["first"]) as found:
            whole = found.app.__call__

            async def compressed(scope, receive, send):
                async def coded(message):
                    headers = [*message.get("headers", ()), (b"content-encoding", b"gzip")]
                    await send(message | {"headers": headers} if "status" in message else message)

                await whole(scope, receive, coded)

            async with listening(compressed) as url:
                found.fleet.models["first"].engine.client = Upstream(url)
                answer = await found.client().post("/v1/chat/completions", json=chat())
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_error")

    asyncio.run(main())


def test_a_client_that_goes_cancels_what_is_done_for_it():
    async def main():
        left, ended = asyncio.Event(), []

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def work():
            try:
                async with while_connected(receive):
                    try:
                        await asyncio.sleep(60)
                    finally:
                        ended.append(True)
                        raise OSError  # as a connection that is being closed may
            except ClientGone:
                await asyncio.sleep(0.01)  # the task itself is not cancelled
                return "gone"

        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        left.set()
        assert await task == "gone" and ended == [True]
        assert task.cancelling() == 0

        left.clear()
        async with while_connected(receive):
            await asyncio.sleep(0)
        task = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(OSError):  # noqa: PT011  # not of the client's leaving
            await task

    asyncio.run(main())
