"""The way to an engine, and what is passed on of its answers."""

from __future__ import annotations

import asyncio
import datetime
import ssl

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
                with pytest.raises(FAILURES):
                    await upstream.ask("GET", "/")
            nobody = Upstream("http://127.0.0.1:9")
            with pytest.raises(FAILURES):
                await nobody.ask("GET", "/")
            await nobody.close()

    asyncio.run(main())


DAY = datetime.timedelta(days=1)
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def own_certificate(folder, host):
    """A certificate and its key that nobody else has signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + DAY)
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False).sign(
        key, hashes.SHA256()
    )
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / f"{host}.pem"
    pem = serialization.Encoding.PEM
    file.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, *plain))
    return file


@pytest.mark.parametrize("trusted", ["localhost", "elsewhere"])
def test_a_server_elsewhere_has_to_prove_its_name(tmp_path, monkeypatch, trusted):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(WHOLE)

    async def main():
        certificate = own_certificate(tmp_path, trusted)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        upstream = Upstream(f"https://localhost:{server.sockets[0].getsockname()[1]}/v1")
        if trusted == "localhost":
            assert await upstream.ask("GET", "/models") == (200, b"ok")
        else:
            with pytest.raises(FAILURES, match="localhost"):
                await upstream.ask("GET", "/models")
        await upstream.close()
        server.close()

    asyncio.run(main())


def test_an_engine_waits_for_a_slow_reader_and_ends_when_nobody_reads_on():
    sent, gone = [], asyncio.Event()

    async def endless(scope, receive, send):
        await read_body(receive, 1 << 20)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await asyncio.wait({asyncio.ensure_future(receive())}, timeout=0))[1]:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent.append(65536)
        gone.set()

    async def main():
        async with listening(endless) as url:
            upstream = Upstream(url)
            answer = await upstream.send("POST", "/", b"{}")
            await asyncio.sleep(1.0)
            before = sum(sent)
            await asyncio.sleep(0.3)
            assert sum(sent) == before < 64 << 20, "it goes on writing"
            taken = 0
            async for chunk in answer.content.iter_any():
                taken += len(chunk)
                if taken > before:
                    break
            assert sum(sent) > before
            answer.close()
            await asyncio.wait_for(gone.wait(), 10)
            await upstream.close()

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


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_an_engine_refuses_is_not_the_clients(tmp_path, status):
    """A client would look for the fault in its own key, and the text may show the operator's."""

    async def refuses(scope, receive, send):
        await respond(
            send, status, b'{"error": {"message": "Incorrect API key provided: sk-operator", "code": "invalid"}}'
        )

    async def main():
        async with served(tmp_path, names=["first"]) as found, listening(refuses) as url:
            found.fleet.models["first"].engine.client = Upstream(url)
            answer = await found.client().post("/v1/chat/completions", json=chat())
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_error")
            assert "operator" not in answer.text

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
