"""`POST /v2/guard` and `/v2/guard/results`, compatible with Lakera's API. Offsets count characters (code points). Clients that
count UTF-16 units, as JavaScript does, use `/utf-16/v2/guard` and `/utf-16/v2/guard/results`, or the header `x-offsets: utf-16`."""

from __future__ import annotations

import uuid
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from dstune import __version__
from dstune.guard.bodies import Placed, media_in, of_message
from dstune.guard.calibration import LEVELS, UNLIKELY
from dstune.guard.check import MOST_TEXTS, NOT_RUN, Entry, GuardDown, Verdict, estimated_windows
from dstune.guard.front import Guard, note, unavailable
from dstune.guard.policy import CLOSED, PII, SECRETS, Policy
from dstune.serve.asgi import while_connected
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway, Handler, Route
from dstune.serve.gateway.request import Request

MOST_MESSAGES = 2048
KNOWN = frozenset({"messages", "project_id", "payload", "breakdown", "dev_info", "metadata"})
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
UTF_16 = "utf-16"


def routes(guard: Guard) -> list[Route]:
    def handler(*, decides: bool, units: str = "") -> Handler:
        async def handle(gateway: Gateway, request: Request) -> None:
            await _answer(guard, gateway, request, decides=decides, units=units)

        return handle

    return [
        Route("POST", f"{start}/v2/guard{end}", handler(decides=not end, units=units), "member", plain_errors=True)
        for start, units in (("", ""), ("/utf-16", UTF_16))
        for end in ("", "/results")
    ]


async def _answer(guard: Guard, gateway: Gateway, request: Request, *, decides: bool, units: str) -> None:
    body = await request.json()
    placed = _placed(body)
    requested = {name: _flag(body, name) for name in ("payload", "breakdown", "dev_info")}
    policy = _policy(guard, body.get("project_id"))
    units = units or _units(request)
    texts = [item.text for item in placed]
    everything = requested["breakdown"] or not decides
    try:
        async with gateway.admission.place(request.key, request.receive), while_connected(request.receive):
            checking = guard.check(policy, texts, everything=everything)
            verdict = await guard.charged(request, estimated_windows(policy, texts), checking)
    except GuardDown as error:
        guard.record(request, policy, "guard", None, str(error))
        if policy.on_failure == CLOSED:
            raise unavailable() from None
        verdict = _nothing_ran(policy, placed, str(error))
    else:
        guard.record(request, policy, "guard", verdict)
    note(request, verdict)
    ignored = ", ".join([*sorted(set(body) - KNOWN), *sorted(set().union(*map(media_in, body["messages"])))])[:500]
    request.note(b"x-guard-ignored", [ignored] if ignored else [])
    if verdict.refused and not verdict.blocked:
        too_long = [item for item in verdict.not_run.values() if item.startswith("more than")]
        if too_long:
            raise ApiError(413, f"The messages are too long to be checked: {too_long[0]}.", code="too_long_to_check")
        raise unavailable()
    answer: dict[str, Any] = {"metadata": {"request_uuid": str(uuid.uuid4()), "request_id": request.id}}
    if verdict.not_run:
        answer["not_run"] = dict(sorted(verdict.not_run.items()))
    if not decides:
        answer["results"] = [_result(entry) for entry in _reported(verdict, placed)]
    else:
        answer["flagged"] = verdict.flagged
        if requested["breakdown"]:
            answer["breakdown"] = [_entry(policy, body.get("project_id"), item) for item in _reported(verdict, placed)]
    if requested["payload"]:
        answer["payload"] = list(_payload(verdict, placed, units))
    if requested["dev_info"]:
        unknown = dict.fromkeys(("model_version", "git_revision", "git_timestamp"))
        answer["dev_info"] = {"version": __version__, **unknown}
    await request.answer(answer)


# -- requests ---------------------------------------------------------------------------------------------------------


def _placed(body: Mapping[str, Any]) -> list[Placed]:
    """Return the texts of a request with their places. Raises ApiError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MOST_MESSAGES:
        raise ApiError(422, f"messages must be a list of 1 to {MOST_MESSAGES} messages.", param="messages")
    texts: list[Placed] = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            reason = f"messages[{number}] needs a role: {', '.join(sorted(ROLES))}."
            raise ApiError(422, reason, param="messages")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise ApiError(
                422, f"messages[{number}].content must be a text, a list of parts or null.", param="messages"
            )
        texts += islice(of_message(message, number, ("messages", number)), MOST_TEXTS + 1 - len(texts))
    for entry in texts:
        try:
            entry.text.text.encode()
        except UnicodeEncodeError:
            raise ApiError(422, "A message is no UTF-8 text.", param="messages") from None
    return texts


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(422, f"{name} must be true or false.", param=name)
    return bool(value)


def _policy(guard: Guard, project: Any) -> Policy:
    if project is not None and not isinstance(project, str):
        raise ApiError(422, "project_id must be a text.", param="project_id")
    policy = guard.policies.of_project(project or None)
    if policy is None:
        if project:
            reason = "There is no such project: `projects` of the policies names them."
            raise ApiError(404, reason, param="project_id", code="project_not_found")
        reason = "`routes` of the policies names none for /v2/guard; `projects` names one for each project_id."
        raise ApiError(404, reason, code="route_off")
    return policy


def _units(request: Request) -> str:
    unit = request.header("x-offsets").lower()
    if unit not in ("", "code-points", UTF_16):
        raise ApiError(422, f"x-offsets must be code-points or {UTF_16}.", param="x-offsets")
    return unit


def _nothing_ran(policy: Policy, placed: Iterable[Placed], reason: str) -> Verdict:
    verdict = Verdict(policy)
    for placed_text in placed:
        for watch in policy.watches(placed_text.text.direction):
            verdict.entries.append(Entry(watch.detector, placed_text.text.message, watch.action, None, NOT_RUN))
            verdict.not_run[watch.detector] = reason
    return verdict


# -- answers ----------------------------------------------------------------------------------------------------------


def _reported(verdict: Verdict, placed: list[Placed]) -> list[Entry]:
    """Return for each detector the messages with findings, or else one entry: its most certain one."""
    last = max((item.text.message for item in placed), default=0)
    order = [*LEVELS, "uncalibrated", UNLIKELY, NOT_RUN]
    by_detector: dict[str, dict[int, Entry]] = {}
    for entry in verdict.entries:
        entry_by_message = by_detector.setdefault(entry.detector, {})
        earlier = entry_by_message.get(entry.message)
        if earlier is None or (not entry.detected, order.index(entry.level)) < (
            not earlier.detected,
            order.index(earlier.level),
        ):
            entry_by_message[entry.message] = entry
    reported: list[Entry] = []
    for entry_by_message in by_detector.values():
        detected = [entry for entry in entry_by_message.values() if entry.detected]
        unknown = [entry for entry in entry_by_message.values() if entry.detected is None]
        # Not having run somewhere outweighs having found nothing elsewhere.
        reported += (
            detected
            or unknown[:1]
            or [min(entry_by_message.values(), key=lambda item: (order.index(item.level), abs(last - item.message)))]
        )
    return reported


def _entry(policy: Policy, project: str | None, entry: Entry) -> dict[str, Any]:
    return {
        "project_id": project,
        "policy_id": policy.name,
        "detector_id": f"{policy.name}/{entry.detector}",
        "detector_type": entry.detector,
        "detected": entry.detected,
        "result": entry.level,
        "action": entry.action,
        "message_id": entry.message,
    }


def _result(entry: Entry) -> dict[str, Any]:
    return {"detector_type": entry.detector, "result": entry.level, "message_id": entry.message}


LABELS = {detector: kind for kind, detector in PII.items()} | {SECRETS: "SECRET"}


def _payload(verdict: Verdict, placed: list[Placed], units: str) -> Iterable[dict[str, Any]]:
    """Yield spans with offsets in their messages. In a content of several parts, offsets count its texts concatenated; elsewhere
    they start at the text."""
    length_by_message: dict[int, int] = {}
    starts, wide = [], []
    for placed_text in placed:
        starts.append(length_by_message.get(placed_text.text.message, 0) if _in_content(placed_text) else 0)
        wide.append(
            [place for place, sign in enumerate(placed_text.text.text) if sign > "\uffff"] if units == UTF_16 else []
        )
        if _in_content(placed_text):
            length_by_message[placed_text.text.message] = starts[-1] + len(placed_text.text.text) + len(wide[-1])
    for span in sorted(verdict.spans, key=lambda span: (span.text, span.start, span.end)):
        placed_text = placed[span.text]
        start, end = (
            starts[span.text] + place + bisect_left(wide[span.text], place) for place in (span.start, span.end)
        )
        yield {
            "start": start,
            "end": end,
            "text": placed_text.text.text[span.start : span.end],
            "detector_type": span.detector,
            "labels": [LABELS.get(span.detector, span.detector)],
            "message_id": placed_text.text.message,
        } | ({} if _in_content(placed_text) else {"field": ".".join(map(str, placed_text.place[2:]))})


def _in_content(placed_text: Placed) -> bool:
    """Return whether a client counts this text: a content, a text part, or the text of a part, but no other field of a part."""
    match placed_text.place[2:]:
        case ("content",) | ("content", int()) | ("content", int(), "text"):
            return True
    return False
