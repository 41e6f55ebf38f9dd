"""Items and results as JSON, between the gateway and the guard's process."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dstune.serve.guard.scanner import Found, Item, Result, Scored

_SETS, _TUPLES = ("detectors", "decisive"), ("links", "prompts", "public", "canaries")


def item_to_json(item: Item) -> dict[str, Any]:
    return asdict(item) | {name: sorted(getattr(item, name)) for name in _SETS}


def item_from_json(value: dict[str, Any]) -> Item:
    sets = {name: frozenset(value[name]) for name in _SETS}
    return Item(**(value | sets | {name: tuple(value[name]) for name in _TUPLES}))


def result_from_json(value: dict[str, Any]) -> Result:
    found = tuple(Found(**one) for one in value["found"])
    scores = {detector: Scored(**one) for detector, one in value["scores"].items()}
    return Result(found, scores, value["not_run"], value["computed"], value["variants"])


def result_to_json(result: Result) -> dict[str, Any]:
    return asdict(result)
