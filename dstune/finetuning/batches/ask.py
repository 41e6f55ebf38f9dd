"""Runs one request of a batch through the gateway's own inference, without a connection."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from dstune.core.errors import UserError
from dstune.serve.asgi import Message, dumps
from dstune.serve.engines.base import EngineDown
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request
from dstune.serve.gateway.routes import INFERENCE
from dstune.serve.store.keys import Caller

log = logging.getLogger("dstune.serve")

BUSY = (429, 503)
"""Statuses after which a request is retried."""
PAUSE_SECONDS = 1.0


async def ask(gateway: Gateway, caller: Caller, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the `response` of a batch's output line: status, request id and body."""
    while True:
        request, answer = _request(gateway, caller, path, body)
        try:
            await gateway.admission.check_rate(caller)
            await gateway.inference(request, path, INFERENCE[path])
            return {"status_code": request.status, "request_id": request.id, "body": json.loads(bytes(answer))}
        except ApiError as error:
            if error.status not in BUSY:
                return _failed(request, error)
        except EngineDown:
            pass  # the engine is being restarted
        except UserError as error:
            return _failed(request, ApiError(400, "; ".join(problem.reason for problem in error.problems)))
        except Exception:
            log.exception("%s: a request of a batch failed", request.id)
            message = "The server failed to answer this request."
            return _failed(request, ApiError(500, message, code="server_error"))
        await asyncio.sleep(PAUSE_SECONDS)


def _failed(request: Request, error: ApiError) -> dict[str, Any]:
    return {"status_code": error.status, "request_id": request.id, "body": json.loads(error.body())}


def _request(gateway: Gateway, caller: Caller, path: str, body: dict[str, Any]) -> tuple[Request, bytearray]:
    content, answer = dumps(body), bytearray()
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Message:
        if parts:
            return parts.pop()
        return await asyncio.get_running_loop().create_future()  # there is no client to disconnect

    async def send(message: Message) -> None:
        answer.extend(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    request = Request(
        {"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send, gateway.settings
    )
    request.caller = caller
    return request, answer
