"""Requests that an engine answers: checks, admits and forwards them, and cancels them when the client disconnects."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp

from dstune.serve import fields
from dstune.serve.asgi import ClientGone, dumps, while_connected
from dstune.serve.engines.base import Engine
from dstune.serve.engines.http import FAILURES, MOST_READ_BYTES, Upstream, object_of, within_event
from dstune.serve.errors import ApiError
from dstune.serve.events import EVENT_END, MOST_END_BYTES, event_data
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
    """The handler of requests to engines."""

    fleet: Fleet
    admission: Admission
    metrics: Metrics
    recorder: Recorder
    admits: Callable[[Caller, str], Awaitable[None]] | None = None
    """Called first with the caller and the model's name: loads a model that is not on its engine yet, and refuses other tenants'
    models."""
    guard: Guard | None = None
    resolve_alias: Callable[[str, Mapping[str, Any], Mapping[str, Model]], str | None] | None = None
    """Returns the name of the model that answers a request (its body) if the requested name stands for several served models; None
    for any other name."""

    async def __call__(self, request: Request, path: str, route: type[fields.Request]) -> None:
        """Answer a request. Raises ApiError, ClientGone, SlowReader."""
        body = await request.json()
        name = body.get("model")
        if isinstance(name, str) and name in request.settings.aliases:
            request.alias, name = name, request.settings.aliases[name]
            body = body | {"model": name}  # adapters on one engine are distinguished by this name
        if self.resolve_alias is not None and isinstance(name, str):
            ready = {served_name: model for served_name, model in self.fleet.models.items() if model.ready}
            version = self.resolve_alias(name, body, ready)
            if version is not None:
                request.alias, name = request.alias or name, version
                body = body | {"model": version}  # adapters on one engine are distinguished by this name
        if self.admits is not None and isinstance(name, str) and request.caller is not None:
            await self.admits(request.caller, name)
        model = self.model_of(request, name)
        supported_fields = model.engine.routes.get(path)
        if supported_fields is None:
            served = ", ".join(model.engine.routes) or "nothing"
            raise ApiError(
                404, f"The model {model.source.name!r} does not serve {path}; it serves {served}.", param="model"
            )
        request.model = model.source.name
        engine, max_tokens = model.engine, request.settings.max_output_tokens

        def check(body: dict[str, Any]) -> dict[str, Any]:
            accepted = fields.checked(body, route, supported_fields)
            request.refuse_halves(accepted)
            check_context(path, accepted, engine)
            return bounded(path, accepted, engine, max_tokens)

        with self._charge_unread_prompt(request.key, engine):
            await self._answer(request, path, await request.run_in_thread(partial(check, body)))

    async def _answer(self, request: Request, path: str, body: dict[str, Any]) -> None:
        """Answer a request, whose body has been checked."""
        names = [name for key in ("user", "safety_identifier") if isinstance(name := body.get(key), str) and name]
        request.end_user, request.safety_identifier, *_ = [*dict.fromkeys(names), None, None]
        async with self.admission.place(request.key, request.receive):
            guarded = None
            if self.guard is not None:
                async with while_connected(request.receive):
                    guarded = await self.guard.request(request, path, body)
                body = guarded.body if guarded is not None else body
            await self.fleet.wait_until_replaced(request.model)
            # While the request waited, its engine may have been restarted, or its model's name given to another adapter.
            model = self.model_of(request, request.model)
            request.version = model.version
            with self.recorder.answer(request, body) as record:
                await self._forward(request, model, path, body, record, guarded)

    @contextmanager
    def _charge_unread_prompt(self, caller: Caller, engine: Engine) -> Iterator[None]:
        """Charge the caller for a full context if the prompt is refused as too long: the engine has read that much of it."""
        try:
            yield
        except ApiError as error:
            if error.code == TOO_LONG:
                self.admission.charge(caller, engine.context)
            raise

    def model_of(self, request: Request, name: Any) -> Model:
        """Return the model that a request names. Raises ApiError if it does not exist, or this caller may not use it."""
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
        request_body, usage = body, None
        options = body.get("stream_options") or {}
        # The gateway counts tokens as the engine reports them, whether or not the client asked for the usage.
        if body.get("stream") and "stream_options" in model.engine.routes[path] and not options.get("include_usage"):
            request_body, usage = body | {"stream_options": {**options, "include_usage": True}}, UsageRemover()
        engine = model.engine

        def outgoing() -> bytes:
            client_fields = {"client": request.key.id} if engine.knows_clients else {}
            return dumps(engine.outgoing(path, request_body) | client_fields)

        content = await request.run_in_thread(outgoing)
        try:
            async with while_connected(request.receive):
                answers = guarded if guarded is not None and guarded.looks_at_answers else None
                await self._pass(request, client, path, content, record, answers, usage)
        except (ApiError, ClientGone, SlowReader):
            raise
        except Exception as error:
            # The engine may be stopping, and its connections may close at any moment.
            if not (isinstance(error, FAILURES) or client.closed):
                raise
            if request.status:  # the answer has begun: cut it off, so that nobody takes it for complete
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
        usage: UsageRemover | None,
    ) -> None:
        """Forward the engine's answer as it arrives: raw bytes, as fast as the client reads them; a guarded answer once it has been
        checked. usage: removes the usage event."""
        answer = await client.send("POST", path, content)
        try:
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise ApiError(502, "The engine compresses its answers.", code="engine_error")
            if answer.status != 200:
                raise await _error_from_engine(answer)
            kind = answer.headers.get("content-type", "application/json")
            headers = [(b"content-type", kind.encode("latin-1"))]
            if not kind.startswith("text/event-stream"):
                content = await _read_bounded(answer)
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
            await request.send({"type": "http.response.body", "body": b"" if usage is None else usage.unfinished_event})
        finally:
            answer.close()


_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')


class UsageRemover:
    """Removes the usage event from a stream whose client did not ask for it."""

    def __init__(self) -> None:
        self.unfinished_event = b""
        """The beginning of an incomplete event."""

    def take(self, chunk: bytes) -> bytes:
        """Return the complete events of the stream so far that have not been returned yet."""
        if not self.unfinished_event and chunk.endswith(b"\n\n") and not _NO_CHOICES.search(chunk):
            return chunk
        buffered, start, visible = self.unfinished_event + chunk, 0, []
        for end in EVENT_END.finditer(buffered, max(len(self.unfinished_event) - MOST_END_BYTES, 0)):
            if not _is_usage_event(event := buffered[start : end.end()]):
                visible.append(event)
            start = end.end()
        self.unfinished_event = within_event(buffered[start:])
        return b"".join(visible)


def _is_usage_event(event: bytes) -> bool:
    if not _NO_CHOICES.search(event):
        return False
    try:
        value = object_of(event_data(event))
    except FAILURES:
        return False
    return value.get("choices") == [] and bool(value.get("usage"))


async def _read_bounded(answer: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for chunk in answer.content.iter_any():
        size += len(chunk)
        if size > MOST_READ_BYTES:
            raise ApiError(502, "The engine's answer is too large.", code="engine_error")
        parts.append(chunk)
    return b"".join(parts)


async def _error_from_engine(answer: aiohttp.ClientResponse) -> ApiError:
    """Return the engine's refusal in the API's shape; details of internal errors are not passed on."""
    content = await _read_bounded(answer)
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
"""In the messages of vLLM and llama.cpp."""
