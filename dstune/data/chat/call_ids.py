"""Bring the ids of tool calls and their results into the form that a chat template accepts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Any

Message = dict[str, Any]


class CallIds(Enum):
    """The form of ids that a template accepts."""

    any = "any"
    nine = "nine"
    """Nine letters and digits (Mistral)."""
    functions = "functions"
    """`functions.NAME:NUMBER`, from which the template reads the function's name (Kimi)."""


_FORMS = {CallIds.nine: re.compile(r"[a-zA-Z0-9]{9}"), CallIds.functions: re.compile(r"functions\.\S+:\d+")}


def with_call_ids(messages: Sequence[Message], form: CallIds) -> list[Message]:
    """Return `messages` with ids of this form in calls and results; ids that have it already stay.

    An id depends only on what precedes it, so a conversation and its beginning get the same ids. Results without an id
    belong to the preceding calls, in order.
    """
    if form is CallIds.any or not any(message.get("tool_calls") for message in messages):
        return list(messages)
    changed: list[Message] = []
    used: set[str] = set()
    new_by_old: dict[str, str] = {}
    unanswered: list[str] = []
    count = 0
    for message in messages:
        if calls := message.get("tool_calls"):
            ids = []
            for call in calls:
                old_id = str(call.get("id") or "")
                new_id = _id_of(old_id, call["function"]["name"], count, form, used)
                used.add(new_id)
                if old_id:
                    new_by_old[old_id] = new_id
                ids.append(new_id)
                count += 1
            unanswered = list(ids)
            message = {
                **message,
                "tool_calls": [{**call, "id": call_id} for call, call_id in zip(calls, ids, strict=True)],
            }
        elif message["role"] == "tool":
            old_id = str(message.get("tool_call_id") or "")
            new_id = new_by_old.get(old_id, old_id) or (unanswered[0] if unanswered else "")
            unanswered = [call_id for call_id in unanswered if call_id != new_id]
            message = {**message, "tool_call_id": new_id} if new_id else message
        changed.append(message)
    return changed


def _id_of(old_id: str, name: str, count: int, form: CallIds, used: set[str]) -> str:
    """Return the new id of a call, the one at index `count` among all calls of the conversation."""
    if _FORMS[form].fullmatch(old_id) and old_id not in used:
        return old_id
    if form is CallIds.functions:
        return f"functions.{name}:{count}"
    short = re.sub(r"[^a-zA-Z0-9]", "", old_id)[-9:]
    return short if len(short) == 9 and short not in used else f"{count:09d}"
