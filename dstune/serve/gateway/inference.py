"""Requests that an engine answers: checked, admitted, passed on, cancelled when the client goes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from dstune.serve import fields
from dstune.serve.asgi import ClientGone, dumps, while_connected
from dstune.serve.engines.base import Engine
from dstune.serve.engines.http import FAILURES, MOST_READ_BYTES, Upstream, object_of, within_event
from dstune.serve.errors import ApiError
from dstune.serve.events import EVENT_END, MOST_END_BYTES, data_of
from dstune.serve.fleet import Fleet, Model
from dstune.serve.gateway.admission import Admission
from dstune.serve.gateway.guarding import Guard, Guarded
from dstune.serve.gateway.metrics import Metrics
from dstune.serve.gateway.output_bound import TOO_LONG, bounded, check_context
from dstune.serve.gateway.recording import Record, Recorder
from dstune.serve.gateway.request import Request, SlowReader
from dstune.serve.store.keys import Caller

log = logging.getLogger("dstune.serve")


@dataclass
class Inference:
    """What requests to engines need."""

    fleet: Fleet
    admission: Admission
    metrics: Metrics
    recorder: Recorder
    admits: Callable[[Caller, str], Awaitable[None]] | None = None
    """Looks at a request's model first: loads one that is not on its engine yet, and refuses those of other tenants."""
    guard: Guard | None = None
    resolve_alias: Callable[[str, Mapping[str, Any], Mapping[str, Model]], str | None] | None = None
    """The name of the model that answers a request (its body) to a name that stands for several of those that are served; None
    for any other name."""

    async def __call__(self, request: Request, path: str, route: type[fields.Request]) -> None:
        """Raises ApiError, ClientGone, SlowReader."""
        body = await request.json()
        name = body.get("model")
        if self.resolve_alias is not None and isinstance(name, str):
            ready = {served_name: model for served_name, model in self.fleet.models.items() if model.ready}
            version = self.resolve_alias(name, body, ready)
            if version is not None:
                request.alias, name = name, version
                body = body | {"model": version}  # adapters of one engine are told apart by it
        if self.admits is not None and isinstance(name, str) and request.caller is not None:
            await self.admits(request.caller, name)
        model = self.model_of(request, name)
        acts = model.engine.routes.get(path)
        if acts is None:
            served = ", ".join(model.engine.routes) or "nothing"
            raise ApiError(
                404, f"The model {model.source.name!r} does not serve {path}; it serves {served}.", param="model"
            )
        request.model = model.source.name
        checked_body, engine, max_tokens = body, model.engine, request.settings.max_output_tokens

        def prepared() -> dict[str, Any]:
            accepted = fields.checked(checked_body, route, acts)
            request.refuse_halves(accepted)
            check_context(path, accepted, engine)
            return bounded(path, accepted, engine, max_tokens)

        with self._charge_unread_prompt(request.key, engine):
            await self._answer(request, path, await request.apart(prepared))

    async def _answer(self, request: Request, path: str, body: dict[str, Any]) -> None:
        """Answer a request. body: that was checked."""
        user = body.get("user") or body.get("safety_identifier")
        request.end_user = user if isinstance(user, str) else None
        async with self.admission.place(request.key, request.receive):
            guarded = None
            if self.guard is not None:
                async with while_connected(request.receive):
                    guarded = await self.guard.request(request, path, body)
                body = guarded.body if guarded is not None else body
            await self.fleet.settled(request.model)
            # Its engine may have been started again while the request waited, and its name given to another adapter.
            model = self.model_of(request, request.model)
            request.version = model.version
            with self.recorder.answer(request, body) as record:
                await self._forward(request, model, path, body, record, guarded)

    @contextmanager
    def _charge_unread_prompt(self, caller: Caller, engine: Engine) -> Iterator[None]:
        """Charge the caller for a full context where the prompt is refused as too long: the engine has read that much of it."""
        try:
            yield
        except ApiError as error:
            if error.code == TOO_LONG:
                self.admission.charge(caller, engine.context)
            raise

    def model_of(self, request: Request, name: Any) -> Model:
        """Return the model that a request names. Raises ApiError for a name that is none, or none for this caller."""
        if not isinstance(name, str) or not name:
            raise ApiError(400, "Missing required field: 'model'.", param="model", code="missing_required_parameter")
        model = self.fleet.models.get(name)
        is_usable = request.caller is not None and request.caller.may_use(request.alias or name)
        if is_usable and (name in self.fleet.awaited if model is None else not model.ready):
            raise ApiError(503, "The model is being started.", code="starting", headers={"retry-after": "5"})
        if model is None or not is_usable:
            raise ApiError(
                404,
                f"The model {name[:128]!r} does not exist: GET /v1/models lists those of this key.",
                param="model",
                code="model_not_found",
            )
        return model

    async def _forward(
        self, request: Request, model: Model, path: str, body: dict[str, Any], record: Record, guarded: Guarded | None
    ) -> None:
        client = model.engine.client
        if client is None:
            raise ApiError(503, "The model is being started.", code="starting", headers={"retry-after": "5"})
        sent, usage = body, None
        options = body.get("stream_options") or {}
        # Tokens are counted as the engine tells them, whether the client wants to know or not.
        if body.get("stream") and "stream_options" in model.engine.routes[path] and not options.get("include_usage"):
            sent, usage = body | {"stream_options": {**options, "include_usage": True}}, WithoutUsage()
        engine = model.engine

        def outgoing() -> bytes:
            client_fields = {"client": request.key.id} if engine.knows_clients else {}
            return dumps(engine.outgoing(path, sent) | client_fields)

        content = await request.apart(outgoing)
        try:
            async with while_connected(request.receive):
                answers = guarded if guarded is not None and guarded.looks_at_answers else None
                await self._pass(request, client, path, content, record, answers, usage)
        except (ApiError, ClientGone, SlowReader):
            raise
        except Exception as error:
            # The engine's connections may be closed at any moment, since it is being stopped.
            if not (isinstance(error, FAILURES) or client.closed):
                raise
            if request.status:  # the answer has begun: it is cut, so that nobody takes it for complete
                raise SlowReader from error
            raise ApiError(503, "The engine has ended.", code="engine_down", headers={"retry-after": "5"}) from None

    async def _pass(
        self,
        request: Request,
        client: Upstream,
        path: str,
        content: bytes,
        record: Record,
        guarded: Guarded | None,
        usage: WithoutUsage | None,
    ) -> None:
        """Pass the engine's answer on as it comes: raw bytes, as fast as the client takes them. A guarded one when it was
        checked. usage: takes that event out."""
        answer = await client.send("POST", path, content)
        try:
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise ApiError(502, "The engine compresses its answers.", code="engine_error")
            if answer.status != 200:
                raise await _refusal(answer)
            kind = answer.headers.get("content-type", "application/json")
            headers = [(b"content-type", kind.encode("latin-1"))]
            if not kind.startswith("text/event-stream"):
                content = await _bounded(answer)
                if guarded is not None:
                    content = await guarded.answer(content)
                record.take(content)
                await request.respond(200, content, headers)
                return
            await request.send({"type": "http.response.start", "status": 200, "headers": headers})
            chunks: AsyncIterator[bytes] = answer.content.iter_any()
            if guarded is not None:
                chunks = guarded.stream(chunks)
            async for chunk in chunks:
                record.take(chunk)
                visible = chunk if usage is None else usage.take(chunk)
                if visible:
                    await request.send({"type": "http.response.body", "body": visible, "more_body": True})
            await request.send({"type": "http.response.body", "body": b"" if usage is None else usage.rest})
        finally:
            answer.close()


_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class WithoutUsage:
    """Takes the event with the usage out of a stream whose client did not ask for it."""

    def __init__(self) -> None:
        self.rest = b""
        """The beginning of an event, which is not visible yet."""

    def take(self, chunk: bytes) -> bytes:
        """Return what of the stream may be shown now: events that are whole."""
        if not self.rest and chunk.endswith(b"\n\n") and not _NO_CHOICES.search(chunk):
            return chunk
        seen, start, visible = self.rest + chunk, 0, []
        for end in EVENT_END.finditer(seen, max(len(self.rest) - MOST_END_BYTES, 0)):
            if not _tells_usage(event := seen[start : end.end()]):
                visible.append(event)
            start = end.end()
        self.rest = within_event(seen[start:])
        return b"".join(visible)


def _tells_usage(event: bytes) -> bool:
    if not _NO_CHOICES.search(event):
        return False
    try:
        value = object_of(data_of(event))
    except FAILURES:
        return False
    return value.get("choices") == [] and bool(value.get("usage"))


async def _bounded(answer: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for chunk in answer.content.iter_any():
        size += len(chunk)
        if size > MOST_READ_BYTES:
            raise ApiError(502, "The engine's answer is too large.", code="engine_error")
        parts.append(chunk)
    return b"".join(parts)


async def _refusal(answer: aiohttp.ClientResponse) -> ApiError:
    """Return what an engine refuses, told in one shape; of what went wrong inside of it nothing is told."""
    content = await _bounded(answer)
    try:
        error = json.loads(content).get("error", {})
    except (ValueError, AttributeError):
        error = {}
    status = answer.status
    # The refused key is the operator's, not the client's, and the text may show it.
    if status in (401, 403, 407):
        log.error("the engine refuses the gateway: %d", status)
        return ApiError(502, "The engine refuses the gateway.", code="engine_error")
    if status in (429, 503):
        headers = {"retry-after": answer.headers.get("retry-after", "1")}
        return ApiError(status, "The engine is busy.", code="overloaded", headers=headers)
    if status >= 500 or not isinstance(error, dict) or not isinstance(error.get("message"), str):
        status = 502 if status >= 500 else status
        return ApiError(status, "The engine could not answer this request.", code="engine_error")
    code = TOO_LONG if status == 400 and _TOO_LONG.search(error["message"]) else error.get("code")
    return ApiError(status, error["message"][:2000], param=error.get("param"), code=code)


_TOO_LONG = re.compile(r"maximum (?:context|model) length|available context size")
"""In the words of vLLM and llama.cpp."""
