"""A difference between two models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """What differs, why answers change, and what to do."""

    kind: str
    """A stable name for scripts, `template` for example; docs/export.md lists them."""
    detail: str
    fix: str


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names and the number of the others."""
    texts = list(names)
    further = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + further
