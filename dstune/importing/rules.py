"""What becomes of one key of another tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstune.config.names import nearest
from dstune.importing.result import MEANINGLESS, Import

Rule = Callable[[Import, Any], None]
"""What to do with a value of one key: puts values and choices, or drops it."""


def same(key: str) -> Rule:
    """Return the rule of a value that becomes that of dstune's `key` as it is."""

    def rule(imported: Import, value: Any) -> None:
        imported.put(key, value)

    return rule


def own_code(imported: Import, value: Any) -> None:
    """Leave the code of a model to its user to read before it runs, whatever somebody's file says."""
    if value:
        imported.drop("it runs Python code that comes with the model: read it, then give model.trust_remote_code=true")


def missing(reason: str) -> Rule:
    """Return the rule of a key that dstune has nothing like; switched off it asks for nothing."""

    def rule(imported: Import, value: Any) -> None:
        if value not in (False, 0, "no", "none", "None"):
            imported.drop(reason)

    return rule


def own_way(reason: str) -> Rule:
    """Return the rule of a key that dstune handles on a way of its own, whatever the value."""

    def rule(imported: Import, value: Any) -> None:
        imported.drop(reason, MEANINGLESS)

    return rule


def with_others(imported: Import, value: Any) -> None:
    """Leave a key to another one that it is looked at together with, whose rule notes what becomes of it."""


def apply(table: Mapping[str, Rule], imported: Import) -> None:
    """Apply to every key of the file its rule; one that the table does not have is dropped by name."""
    for key, value in imported.raw.items():
        if value is None or value == "" or value in ([], {}):
            continue
        imported.current = key
        if rule := table.get(key):
            try:
                rule(imported, value)
            except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
                imported.drop("its value is none that the tool takes")
        else:
            similar = nearest(key, table)
            imported.drop("this import does not know the key" + (f" (did you mean {similar}?)" if similar else ""))
