"""Attacks on the fine-tuning API by its clients: group 7 of the demands on it, tenants, and addresses of webhooks."""

from __future__ import annotations

import asyncio
import socket

import openai
import pytest

from dstune.serve.finetuning.addresses import PublicResolver
from dstune.serve.server import BoundedHttp
from tests.support.finetuning_calls import run

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def test_group_7_one_tenant_sees_nothing_of_another(tmp_path):
    async def test(found):
        mine, other = found.openai(), found.openai(found.other)
        file = (await mine.files.create(file=ROW, purpose="fine-tune")).id
        upload = await mine.uploads.create(filename="a", purpose="batch", bytes=3, mime_type="text/plain")
        part = await mine.uploads.parts.create(upload.id, data=b"abc")
        theirs = await other.uploads.create(filename="a", purpose="batch", bytes=3, mime_type="text/plain")
        assert (await other.files.list()).data == []
        for call in (
            other.files.retrieve(file), other.files.content(file), other.files.delete(file),
            other.uploads.parts.create(upload.id, data=b"x"), other.uploads.cancel(upload.id),
            other.uploads.complete(upload.id, part_ids=[part.id]),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                await call
        with pytest.raises(openai.BadRequestError) as caught:
            await other.uploads.complete(theirs.id, part_ids=[part.id])
        assert caught.value.code == "part_not_found"
        with pytest.raises(openai.BadRequestError):
            await other.files.list(after=file)
        assert (await mine.files.content(file)).content == ROW

    run(test, tmp_path)


def refused_bytes(url: str, key: str, size: int) -> tuple[bytes, int]:
    """The answer to an upload of `size` bytes, and how many of them the server took before it hung up."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {size}\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        connection.sendall(head.encode())
        connection.settimeout(20)
        sent, answer = 0, b""
        chunk = b"z" * 65536
        try:
            while sent < size:
                sent += connection.send(chunk)
        except (ConnectionError, TimeoutError):
            pass
        try:
            while piece := connection.recv(65536):
                answer += piece
        except (ConnectionError, TimeoutError):
            pass
    return answer, sent


def test_group_7_a_gigabyte_without_a_key_is_not_read(tmp_path, monkeypatch):
    read, usual = [0], BoundedHttp.data_received

    def counted(self, data):
        read[0] += len(data)
        usual(self, data)

    monkeypatch.setattr(BoundedHttp, "data_received", counted)

    async def test(found):
        answer, sent = await asyncio.to_thread(refused_bytes, found.url, "nothing", 1 << 30)
        assert read[0] < 1 << 20, read
        assert b"401 Unauthorized" in answer and b"x-request-id" in answer
        # What the kernel's buffers of both ends take is sent, but never read by the server.
        assert sent < 8 << 20, sent
        with pytest.raises(openai.AuthenticationError):
            await found.openai("nothing").files.create(file=b"x" * 700_000, purpose="batch")

        def synchronous() -> None:
            with openai.OpenAI(base_url=f"{found.url}/v1", api_key="nothing", max_retries=0) as client:
                client.files.create(file=b"x" * (20 << 20), purpose="batch")

        with pytest.raises(openai.AuthenticationError):
            await asyncio.to_thread(synchronous)
        assert found.gateway.open == 0

    run(test, tmp_path)


def test_a_name_that_stands_for_a_private_address_is_refused_at_the_connection(monkeypatch):
    answers = {"good.example": "1.1.1.1", "rebound.example": "127.0.0.1", "2130706433": "127.0.0.1"}

    async def resolved(self, host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[host], port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)

    async def test():
        resolver = PublicResolver()
        assert (await resolver.resolve("good.example", 443))[0]["host"] == "1.1.1.1"
        for host in ("rebound.example", "2130706433"):
            with pytest.raises(OSError, match="not public"):
                await resolver.resolve(host, 443)

    asyncio.run(test())
