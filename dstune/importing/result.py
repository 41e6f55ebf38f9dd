"""What an import has found so far: values for dstune's keys, and the keys that could not be carried, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstune.config.names import nearest

NOT_SUPPORTED = "not supported"
MEANINGLESS = "meaningless here"
DIFFERENT = "different"


@dataclass(frozen=True)
class Dropped:
    """A key that was not carried over."""

    kind: str
    """NOT_SUPPORTED, MEANINGLESS (dstune does it on its own way), or DIFFERENT (carried, but not to the letter)."""
    reason: str
    value: Any = None


@dataclass
class Import:
    """A configuration of another tool on its way to an experiment."""

    raw: dict[str, Any]
    """The other tool's keys, its own defaults included."""
    ranks: int
    defaults: frozenset[str] = frozenset()
    """Keys of `raw` that the file does not have: the tool's default stands in for them."""
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    current: str = ""
    """The key that is being looked at."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the other tool's value; `default` where it is absent or empty."""
        value = self.raw.get(key)
        return default if value is None or value == "" else value

    def put(self, key: str, value: Any) -> None:
        """Give dstune's `key` a value, on behalf of the current key."""
        self.values[key] = value
        self.note(key)

    def choose(self, group: str, choice: str) -> None:
        self.choices[group] = choice
        self.note(group)

    def note(self, key: str) -> None:
        names = self.carried.setdefault(self.current, [])
        if key not in names:
            names.append(key)

    def drop(self, reason: str, kind: str = NOT_SUPPORTED, key: str | None = None) -> None:
        """Drop the current key (or `key`), which cannot be carried, or not to the letter."""
        name = self.current if key is None else key
        # What a tool does unless told otherwise is nobody's wish.
        if name in self.defaults:
            return
        if earlier := self.dropped.get(name):
            kind, reason = earlier.kind, f"{earlier.reason}; {reason}"
        secret = re.search(r"token|key|secret|password", name) is not None
        self.dropped[name] = Dropped(kind, reason, "..." if secret else self.raw.get(name))

    def assume(self, text: str) -> None:
        if text not in self.assumed:
            self.assumed.append(text)


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
