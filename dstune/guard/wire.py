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
        value = {item_field.name: getattr(item, item_field.name) for item_field in fields(item)}
        value |= {name: sorted(value[name]) for name in _SETS}
        made.append(value | {name: shared.setdefault(value[name], len(shared)) for name in _SHARED})
    return {"items": made, "shared": list(shared)}


def items_from_json(value: dict[str, Any]) -> list[Item]:
    shared = [tuple(texts) for texts in value["shared"]]
    return [
        Item(
            **entry
            | {name: frozenset(entry[name]) for name in _SETS}
            | {name: tuple(entry[name]) for name in _TUPLES}
            | {name: shared[entry[name]] for name in _SHARED}
        )
        for entry in value["items"]
    ]


def result_from_json(value: dict[str, Any]) -> Result:
    findings = tuple(Found(**entry) for entry in value["found"])
    scores = {detector: Scored(**entry) for detector, entry in value["scores"].items()}
    return Result(findings, scores, value["not_run"], value["computed"], value["tokens"], value["variants"])


def result_to_json(result: Result) -> dict[str, Any]:
    return asdict(result)
