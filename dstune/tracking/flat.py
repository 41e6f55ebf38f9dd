"""Flattens nested values for trackers, which take one level of numbers and short texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstune.config.convert import dotted


def flat(values: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Flatten nested mappings to dotted keys; lists become text."""
    plain = (bool, int, float, str, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in dotted(values)}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers. `skipped`, which holds the reason as text, becomes 1."""
    number_by_name = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    return number_by_name | ({"skipped": 1.0} if "skipped" in metrics else {})


def indented(text: str) -> str:
    """Return `text` as an indented code block of Markdown, which shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())
