"""How a field of the configuration states its default and its range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from enum import Enum
from typing import Any

SIGNED = "signed"
"""In the metadata of a field: whether, or with which values, it runs code or reaches out."""


class MemberName(str):
    """Type of a field whose value is the name of something that is registered: a plain text, checked against `options`."""

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return all names, as they are now: plugins add to them."""
        raise NotImplementedError


class Automatic(Enum):
    """The value of a key that is chosen when the run starts."""

    auto = "auto"


DOC = "doc"
"""In the metadata of a field that stands in no source: its line of documentation."""
BY_METHOD = "by_method"
"""There of one whose default is the method's."""


def options_of(hint: Any) -> tuple[str, ...]:
    """Return the words that a field of this type takes; empty for types whose values are not among a few words."""
    if not isinstance(hint, type):
        return ()
    if issubclass(hint, MemberName):
        return hint.options()
    return tuple(hint.__members__) if issubclass(hint, Enum) else ()


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    by_method: bool = False,
    signed: bool | Callable[[Any], bool] = False,
) -> Any:
    """Declare a field with a default and the range that `ranges.check_ranges` enforces (None is always allowed).

    by_method: where nobody gives a value, a composed configuration has the method's (`config.by_method`) in place of `default`.
    signed: it runs code or reaches out with any other value than the default, or with those that the function says: a stored
    run is believed in it only with a signature (`config/trust.py`). For values and lists, not for mappings.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    if by_method:
        metadata[BY_METHOD] = True
    if signed:
        metadata[SIGNED] = signed
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
