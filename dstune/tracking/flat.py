"""Nested values as trackers take them: one level, numbers and short texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str | None]:
    """Nested mappings as dotted keys; lists as text."""
    result: dict[str, bool | int | float | str | None] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, (bool, int, float, str)):
            result[f"{prefix}{name}"] = value
        else:
            result[f"{prefix}{name}"] = str(value)
    return result


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are numbers; `skipped`, a text, as 1."""
    found = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    return found | ({"skipped": 1.0} if "skipped" in metrics else {})
