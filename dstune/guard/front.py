"""The guard in front of engines: checks requests before an engine sees them, and answers before the client does."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aiohttp import ClientPayloadError

from dstune.guard.audit import Audit
from dstune.guard.bodies import (
    ANSWERED_IN_TEXT,
    REVEALING_FIELDS,
    Placed,
    is_name,
    of_answer,
    of_request,
    put,
    texts_in,
    withheld,
    without_revealing_fields,
)
from dstune.guard.check import Checker, GuardDown, GuardTimeout, Text, Verdict, estimated_windows, item_of, masked
from dstune.guard.engine import Guarding
from dstune.guard.policy import CLOSED, Policy
from dstune.guard.streams import HeldBack, Stopped
from dstune.serve.asgi import dumps, event
from dstune.serve.engines.http import MOST_READ_BYTES, object_of, of_its_shape
from dstune.serve.errors import ApiError, error_body
from dstune.serve.events import DONE, EventReader
from dstune.serve.images import asks_about_images

if TYPE_CHECKING:
    from dstune.serve.gateway.admission import Admission
    from dstune.serve.gateway.request import Request

log = logging.getLogger("dstune.serve")

FLAGGED, UNCHECKED = b"x-guard-flagged", b"x-guard-unchecked"
FILTERED = "content_filter"


def unavailable() -> ApiError:
    message = "The guard could not check this, and its policy lets nothing pass unchecked."
    return ApiError(503, message, code="guard_unavailable", headers={"retry-after": "5"})


class Guard:
    """The policies, the guard's process and its audit log."""

    def __init__(self, guarding: Guarding, audit: Audit, admission: Admission):
        self.guarding, self.policies, self.audit = guarding, guarding.policies, audit
        self.check = Checker(guarding.scan)
        self._admission = admission
        self.counted: Callable[[str, str], None] = lambda direction, decision: None

    @property
    def is_up(self) -> bool:
        return self.guarding.up

    def charge(self, request: Request, tokens: int) -> None:
        if request.caller is not None and tokens:
            self._admission.charge(request.caller, tokens)

    async def charged(self, request: Request, windows: int, verdict: Awaitable[Verdict]) -> Verdict:
        """Return the verdict and charge its tokens to the key. If the verdict comes too late, or the client disconnects, charge
        `windows` windows of the largest size: a client that gives up early pays for the check too. Raises GuardDown."""
        try:
            result = await verdict
        except (GuardTimeout, asyncio.CancelledError):
            self.charge(request, windows * max(self.guarding.engine.window_tokens.values(), default=0))
            raise
        self.charge(request, result.tokens)
        return result

    def record(
        self, request: Request, policy: Policy, direction: str, verdict: Verdict | None, reason: str = ""
    ) -> str:
        """Log a decision and return it."""
        decision = _decision(policy, verdict)
        caller = request.caller.id if request.caller is not None else None
        facts = {"request": request.id, "key": caller, "route": request.path, "model": request.model, "what": direction}
        if reason:
            facts |= {"reason": reason, "policy": policy.name}
        self.audit.add(decision, verdict, **facts)
        self.counted(direction, decision)
        return decision

    async def request(self, request: Request, route: str, body: dict[str, Any]) -> Guarded | None:
        """Return the request as the engine may see it; None if the route has no policy. Raises ApiError."""
        policy = self.policies.of_route(route)
        if policy is None:
            return None
        placed = await request.run_in_thread(lambda: of_request(route, body))
        if asks_about_images(body):
            request.note(UNCHECKED, ["images"])
        texts = [entry.text for entry in placed]
        changed = await self._inspected(request, policy, placed, body)
        prompts = tuple(entry.text for entry in texts if not entry.direction)
        public = tuple(entry.text for entry in texts if entry.direction in ("input", "tool_result"))
        return Guarded(self, policy, request, route, changed, prompts, public)

    async def _inspected(
        self, request: Request, policy: Policy, placed: Sequence[Placed], body: dict[str, Any]
    ) -> dict[str, Any]:
        """Return `body` with its masks applied. Raises ApiError if it is blocked."""
        try:
            texts = [entry.text for entry in placed]
            verdict = await self.charged(request, estimated_windows(policy, texts), self.check(policy, texts))
        except GuardDown as error:
            log.error("%s: the guard could not check: %s", request.id, error)
            self.record(request, policy, "request", None, str(error))
            if policy.on_failure == CLOSED:
                raise unavailable() from None
            note_unchecked(request)
            return body
        self.record(request, policy, "request", verdict)
        note(request, verdict)
        if verdict.blocked:
            raise ApiError(400, f"The request was stopped by: {', '.join(verdict.blocked)}.", code=FILTERED)
        if verdict.refused:
            reasons = {verdict.not_run.get(entry, "did not run") for entry in verdict.unchecked}
            if any(reason.startswith("more than") for reason in reasons):
                message = f"The request is too long to be checked: {'; '.join(sorted(reasons))}."
                raise ApiError(413, message, code="too_long_to_check")
            raise unavailable()
        return put(body, _masked(placed, verdict))


def _masked(placed: Sequence[Placed], verdict: Verdict) -> dict[tuple[str | int, ...], str]:
    return {
        placed[number].place: masked(placed[number].text.text, masks)
        for number, masks in verdict.masks().items()
        if number < len(placed)
    }


def _decision(policy: Policy, verdict: Verdict | None) -> str:
    if verdict is None:
        return "refused" if policy.on_failure == CLOSED else "unchecked"
    if verdict.blocked:
        return "blocked"
    if verdict.unchecked:
        return "refused" if verdict.refused else "unchecked"
    if verdict.flagged:
        return "masked"
    return "flagged" if verdict.detected else "passed"


def note_unchecked(request: Request) -> None:
    request.note(UNCHECKED, ["all"])


def note(request: Request, verdict: Verdict) -> None:
    """Report findings, and detectors that did not run, in response headers, unless the headers have been sent."""
    request.note(FLAGGED, sorted({entry.detector for entry in verdict.detected}))
    request.note(UNCHECKED, sorted(verdict.not_run))


@dataclass
class Guarded:
    """A request that was let through, and its answer."""

    guard: Guard
    policy: Policy
    request: Request
    route: str
    body: dict[str, Any]
    prompts: tuple[str, ...]
    """Texts of the system, which an answer must not repeat."""
    public: tuple[str, ...]
    """Texts of users and tools, whose content may be repeated."""

    @property
    def looks_at_answers(self) -> bool:
        return bool(self.policy.watches("output")) and self.route in ANSWERED_IN_TEXT

    async def answer(self, content: bytes) -> bytes:
        """Check an answer that is not streamed. Raises ApiError if it could not be checked."""
        changed = answer = object_of(content)
        with of_its_shape():
            choices = sorted(of_answer(answer).items())
        for number, placed in choices:
            try:
                verdict = await self._verdict(placed)
            except GuardDown as error:
                self._note_failure(error)
                continue
            self.guard.record(self.request, self.policy, "answer", verdict)
            note(self.request, verdict)
            if verdict.blocked:
                changed = withheld(changed, number)
                if not changed.get("choices"):
                    break
            elif verdict.refused:
                raise unavailable()
            elif masks := _masked(placed, verdict):
                changed = put(without_revealing_fields(changed, number), masks)
        return content if changed is answer else dumps(changed)

    async def _verdict(self, placed: Sequence[Placed]) -> Verdict:
        """Check the texts of one choice."""
        policy = replace(self.policy, directions={"output": self.policy.watches("output")})
        beside = [Text(prompt, "system") for prompt in self.prompts] + [Text(entry, "user") for entry in self.public]
        texts = [*(entry.text for entry in placed), *beside]
        return await self.guard.charged(self.request, estimated_windows(policy, texts), self.guard.check(policy, texts))

    def _note_failure(self, error: GuardDown) -> None:
        """Record that an answer could not be checked. Raises ApiError if the policy lets nothing pass unchecked."""
        log.error("%s: the guard could not check an answer: %s", self.request.id, error)
        self.guard.record(self.request, self.policy, "answer", None, str(error))
        if self.policy.on_failure == CLOSED:
            raise unavailable() from None
        note_unchecked(self.request)

    async def stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the events of an answer once each is checked. The stream ends with `content_filter` if it is blocked, or with an
        error if it could not be checked."""
        total, decided, reason = Verdict(self.policy), True, ""
        try:
            events = self._buffered(chunks, total) if self.route == "/v1/responses" else self._piecewise(chunks, total)
            async for out in events:
                yield out
        except Stopped:
            pass
        except GuardDown as error:
            log.error("%s: the guard could not check an answer: %s", self.request.id, error)
            decided, reason = False, str(error)
            yield b"data: " + error_body(503, str(unavailable()), code="guard_unavailable") + b"\n\n"
        finally:  # also if the client disconnects or the engine ends
            self.guard.record(self.request, self.policy, "answer", total if decided else None, reason)

    def _piecewise(self, chunks: AsyncIterator[bytes], total: Verdict) -> AsyncIterator[bytes]:
        """Yield a stream, each piece of text as soon as it is checked."""

        async def check(context: str, text: str, windows: int) -> Verdict:
            return await self._piece(context, text, windows, total)

        prompts = self.body.get("prompt")
        prompt_count = (
            len(prompts) if isinstance(prompts, list) and not all(type(token) is int for token in prompts) else 1
        )
        return HeldBack(check, prompt_count * (self.body.get("n") or 1)).stream(chunks)

    async def _piece(self, context: str, text: str, windows_before: int, total: Verdict) -> Verdict:
        """Return the verdict on a piece of a stream. Raises GuardDown if nothing may pass unchecked."""
        item = item_of(self.policy, text, "output", self.prompts, self.public)
        item = replace(item, context=context, windows_before=windows_before)
        windows = estimated_windows(self.policy, [Text(text, "assistant")])
        checked = self.guard.charged(self.request, windows, self.guard.check.piece(self.policy, item))
        return await self._added_to(checked, total)

    async def _added_to(self, checked: Awaitable[Verdict], total: Verdict) -> Verdict:
        """Return the verdict after adding it to `total`. Raises GuardDown if nothing may pass unchecked."""
        try:
            verdict = await checked
        except GuardDown as error:
            if self.policy.on_failure == CLOSED:
                raise
            total.not_run |= {watch.detector: str(error) for watch in self.policy.watches("output")}
            return Verdict(self.policy)
        total.entries += [entry for entry in verdict.entries if entry.detected is not False]
        total.not_run |= verdict.not_run
        total.windows += verdict.windows
        total.variants += verdict.variants
        if verdict.refused and not verdict.blocked:
            raise GuardDown("; ".join(verdict.not_run.values()))
        return verdict

    async def _buffered(self, chunks: AsyncIterator[bytes], total: Verdict) -> AsyncIterator[bytes]:
        """Yield a stream of `/v1/responses` after all of it is checked: its events repeat each other's text."""
        events = await _events(chunks)
        echoed = {text for _, text in texts_in(self.body)}
        texts = [text for text in dict.fromkeys(texts_of_events(events)) if text not in echoed]
        placed = [Placed((number,), Text(text, "assistant")) for number, text in enumerate(texts)]
        verdict = await self._added_to(self._verdict(placed), total)
        masked_by = {span.detector for spans in verdict.masks().values() for span in spans}
        if detectors := verdict.blocked or sorted(masked_by):
            error = {"code": FILTERED, "message": f"The answer was stopped by: {', '.join(detectors)}.", "param": None}
            yield b"event: error\n" + event({"type": "error", **error})
            raise Stopped(detectors)
        for value in events:
            kind = str(value.get("type", ""))
            yield (b"event: %s\n" % kind.encode() if _EVENT_NAME.fullmatch(kind) else b"") + event(value)


_EVENT_NAME = re.compile(r"[a-z_.]{1,64}")


async def _events(chunks: AsyncIterator[bytes]) -> list[dict[str, Any]]:
    """Read the events of a complete stream. Raises one of FAILURES if one of them cannot be read."""
    reader, data_of_events, size = EventReader(), [], 0
    async for chunk in chunks:
        if (size := size + len(chunk)) > MOST_READ_BYTES:
            raise ClientPayloadError("the engine's answer is too large")
        data_of_events += list(reader.feed(chunk))
    data_of_events += list(reader.end())
    return [object_of(data) for data in data_of_events if data.strip() != DONE]


def texts_of_events(events: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield every text in the events of `/v1/responses`. Pieces of a text that is spread over several events are joined."""
    written: dict[tuple[Any, ...], list[str]] = {}
    for value in events:
        if isinstance(value.get("delta"), str):
            name = tuple(str(value.get(key)) for key in ("type", "item_id", "output_index", "content_index"))
            written.setdefault(name, []).append(value["delta"])
        for place, text in texts_in(value, skipped_keys=REVEALING_FIELDS):
            if text.strip() and place != ("delta",) and not is_name(place[-1], text):
                yield text
    yield from map("".join, written.values())
