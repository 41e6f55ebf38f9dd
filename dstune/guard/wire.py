"""Items and results as JSON, between the gateway and the guard's process. Texts that all items of a conversation share (system
prompts, users' texts) are sent once: repeated with each item, they would take space quadratic in the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from dstune.guard.scanner import Finding, Item, Result, Scored

_SETS, _TUPLES, _SHARED = ("detectors", "decisive"), ("links", "canaries"), ("prompts", "public")


def items_to_json(items: Sequence[Item]) -> dict[str, Any]:
    shared: dict[tuple[str, ...], int] = {}
    entry = []
    for item in items:
        value = {item_field.name: getattr(item, item_field.name) for item_field in fields(item)}
        value |= {name: sorted(value[name]) for name in _SETS}
        entry.append(value | {name: shared.setdefault(value[name], len(shared)) for name in _SHARED})
    return {"items": entry, "shared": list(shared)}


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
    findings = tuple(Finding(**entry) for entry in value["found"])
    scores = {detector: Scored(**entry) for detector, entry in value["scores"].items()}
    return Result(findings, scores, value["not_run"], value["computed"], value["tokens"], value["variants"])


def result_to_json(result: Result) -> dict[str, Any]:
    return asdict(result)
