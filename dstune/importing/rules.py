"""Rules: each carries one key of another tool over to dstune's keys, or drops it with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstune.config.names import nearest
from dstune.importing.result import MEANINGLESS, Import

Rule = Callable[[Import, Any], None]
"""Handles the value of one key: puts values and choices, or drops the key."""


def same(key: str) -> Rule:
    """Return a rule that gives the value unchanged to dstune's `key`."""

    def rule(imported: Import, value: Any) -> None:
        imported.put(key, value)

    return rule


def own_code(imported: Import, value: Any) -> None:
    """Drop `trust_remote_code`: users must read a model's code before it runs, whatever an imported file says."""
    if value:
        imported.drop("it runs Python code that comes with the model: read it, then give model.trust_remote_code=true")


def missing(reason: str) -> Rule:
    """Return a rule that drops a key without a counterpart in dstune, unless its value turns the feature off."""

    def rule(imported: Import, value: Any) -> None:
        if value not in (False, 0, "no", "none", "None"):
            imported.drop(reason)

    return rule


def own_way(reason: str) -> Rule:
    """Return a rule that drops a key as meaningless, since dstune handles it in its own way whatever the value."""

    def rule(imported: Import, value: Any) -> None:
        imported.drop(reason, MEANINGLESS)

    return rule


def with_others(imported: Import, value: Any) -> None:
    """Do nothing: the rule of another key reads this key too, and notes what becomes of it."""


def apply(table: Mapping[str, Rule], imported: Import) -> None:
    """Apply its rule to every key of the file. A key that the table does not have is dropped by name."""
    for key, value in imported.raw.items():
        if value is None or value == "" or value in ([], {}):
            continue
        imported.current = key
        if rule := table.get(key):
            try:
                rule(imported, value)
            except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
                imported.drop("its value has an unexpected form")
        else:
            similar = nearest(key, table)
            imported.drop("this import does not know the key" + (f" (did you mean {similar}?)" if similar else ""))
