"""Items and results as JSON, between the gateway and the guard's process.

What all items of a conversation share, the words of its system and its users, goes over once: with each item it would be as
large as the square of the conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from dstune.guard.scanner import Found, Item, Result, Scored

_SETS, _TUPLES, _SHARED = ("detectors", "decisive"), ("links", "canaries"), ("prompts", "public")


def items_to_json(items: Sequence[Item]) -> dict[str, Any]:
    shared: dict[tuple[str, ...], int] = {}
    made = []
    for item in items:
        value = {one.name: getattr(item, one.name) for one in fields(item)}
        value |= {name: sorted(value[name]) for name in _SETS}
        made.append(value | {name: shared.setdefault(value[name], len(shared)) for name in _SHARED})
    return {"items": made, "shared": list(shared)}


def items_from_json(value: dict[str, Any]) -> list[Item]:
    shared = [tuple(texts) for texts in value["shared"]]
    return [
        Item(
            **one
            | {name: frozenset(one[name]) for name in _SETS}
            | {name: tuple(one[name]) for name in _TUPLES}
            | {name: shared[one[name]] for name in _SHARED}
        )
        for one in value["items"]
    ]


def result_from_json(value: dict[str, Any]) -> Result:
    found = tuple(Found(**one) for one in value["found"])
    scores = {detector: Scored(**one) for detector, one in value["scores"].items()}
    return Result(found, scores, value["not_run"], value["computed"], value["tokens"], value["variants"])


def result_to_json(result: Result) -> dict[str, Any]:
    return asdict(result)
