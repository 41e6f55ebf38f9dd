"""What an import has found so far: values for dstune's keys, and the keys that could not be carried, with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

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
