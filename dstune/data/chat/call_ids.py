"""Ids of tool calls as a chat template wants them, the same in a call and in its result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Any

Message = dict[str, Any]


class CallIds(Enum):
    """Which ids a template takes."""

    any = "any"
    nine = "nine"
    """Nine letters and digits (Mistral)."""
    functions = "functions"
    """`functions.NAME:NUMBER`, from which the name of the function is read (Kimi)."""


_FORMS = {CallIds.nine: re.compile(r"[a-zA-Z0-9]{9}"), CallIds.functions: re.compile(r"functions\.\S+:\d+")}


def with_call_ids(messages: Sequence[Message], form: CallIds) -> list[Message]:
    """Return `messages` with ids of that form in calls and results; those that have it stay.

    An id follows from what stands in front of it alone, so that a conversation and its beginning have the same ids. Results
    without an id belong to the calls in front of them, in their order.
    """
    if form is CallIds.any or not any(message.get("tool_calls") for message in messages):
        return list(messages)
    changed: list[Message] = []
    used: set[str] = set()
    renamed: dict[str, str] = {}
    waiting: list[str] = []
    count = 0
    for message in messages:
        if calls := message.get("tool_calls"):
            ids = []
            for call in calls:
                old_id = str(call.get("id") or "")
                new = _id_of(old_id, call["function"]["name"], count, form, used)
                used.add(new)
                if old_id:
                    renamed[old_id] = new
                ids.append(new)
                count += 1
            waiting = list(ids)
            message = {
                **message,
                "tool_calls": [{**call, "id": call_id} for call, call_id in zip(calls, ids, strict=True)],
            }
        elif message["role"] == "tool":
            old_id = str(message.get("tool_call_id") or "")
            new = renamed.get(old_id, old_id) or (waiting[0] if waiting else "")
            waiting = [other for other in waiting if other != new]
            message = {**message, "tool_call_id": new} if new else message
        changed.append(message)
    return changed


def _id_of(old_id: str, name: str, count: int, form: CallIds, used: set[str]) -> str:
    """Return the id of the call that is number `count` of a conversation."""
    if _FORMS[form].fullmatch(old_id) and old_id not in used:
        return old_id
    if form is CallIds.functions:
        return f"functions.{name}:{count}"
    short = re.sub(r"[^a-zA-Z0-9]", "", old_id)[-9:]
    return short if len(short) == 9 and short not in used else f"{count:09d}"
