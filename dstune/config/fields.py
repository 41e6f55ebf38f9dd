"""Declares fields of the configuration with their default and range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from enum import Enum
from typing import Any

SIGNED = "signed"
"""Key in a field's metadata: whether, or with which values, the field runs code or contacts other machines."""


class MemberName(str):
    """Type of a field whose value is the name of a registered member: a plain text, checked against `options`."""

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return all names that are registered now; plugins may add more."""
        raise NotImplementedError


class Automatic(Enum):
    """The value of a key that is chosen when the run starts."""

    auto = "auto"


DOC = "doc"
"""Key in the metadata of a field that was not written in source code: its documentation."""
BY_METHOD = "by_method"
"""Key in the metadata of a field whose default depends on the method."""
EXAMPLE = "example"
"""Key in the metadata of a field: a value for examples, as text of the command line."""
NEEDS = "needs"
"""Key in the metadata of a field: settings without which no value of it is accepted, as text of the command line."""


def options_of(hint: Any) -> tuple[str, ...]:
    """Return the words that a field of this type accepts; empty if the type is not limited to certain words."""
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
    example: str = "",
    needs: str = "",
) -> Any:
    """Declare a field with a default and the range that `ranges.check_ranges` enforces (None is always allowed).

    by_method: if nobody sets the field, a composed configuration has the method's value (`config.by_method`) instead of `default`.
    signed: any value but the default, or those for which the function returns true, runs code or contacts other machines. Such a
    value in a stored run is used only with a signature (`config/trust.py`). For values and lists, not for mappings.
    example: a value that messages and `--help KEY` show; without one they show the default, or one of the type.
    needs: settings that the example needs beside it, such as `data.augment.copies=1`.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    if by_method:
        metadata[BY_METHOD] = True
    if signed:
        metadata[SIGNED] = signed
    metadata |= {name: text for name, text in ((EXAMPLE, example), (NEEDS, needs)) if text}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
