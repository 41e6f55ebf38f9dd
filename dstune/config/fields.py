"""How a field of the configuration states its default and its range."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with a default and the range that `ranges.check_ranges` enforces (None is always allowed)."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
