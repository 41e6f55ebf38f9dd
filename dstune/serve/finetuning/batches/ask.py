"""One request of a batch, put to the gateway's own inference without a connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from dstune.serve.asgi import Message, dumps
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.gateway.routes import INFERENCE
from dstune.serve.store.keys import Caller

BUSY = (429, 503)
"""Answers after which a request is put again."""
PAUSE_SECONDS = 1.0


async def ask(gateway: Gateway, caller: Caller, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The `response` of a batch's line: status, request and body."""
    while True:
        request, answer = _request(gateway, caller, path, body)
        try:
            await gateway.inference(request, path, INFERENCE[path])
        except ApiError as error:
            if error.status in BUSY:
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            return {"status_code": error.status, "request_id": request.id, "body": json.loads(error.body())}
        return {"status_code": request.status, "request_id": request.id, "body": json.loads(bytes(answer))}


def _request(gateway: Gateway, caller: Caller, path: str, body: dict[str, Any]) -> tuple[Request, bytearray]:
    content, answer = dumps(body), bytearray()
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if parts:
            return parts.pop()
        return await asyncio.get_running_loop().create_future()  # nobody hangs up

    async def send(message: Message) -> None:
        answer.extend(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    request = Request({"method": "POST", "path": path, "headers": headers}, receive, send, gateway.settings)
    request.caller = caller
    return request, answer
