"""The result of an import: values for dstune's keys, and the keys that could not be carried, each with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from dstune.core.errors import Problem

NOT_SUPPORTED = "not supported"
MEANINGLESS = "meaningless here"
DIFFERENT = "different"


@dataclass(frozen=True)
class Dropped:
    """A key that was not carried over."""

    kind: str
    """NOT_SUPPORTED, MEANINGLESS (dstune handles it in its own way), or DIFFERENT (carried, but not exactly)."""
    reason: str
    value: Any = None


@dataclass
class Import:
    """A configuration of another tool while it is converted into an experiment."""

    raw: dict[str, Any]
    """The other tool's keys, including its defaults."""
    ranks: int
    defaults: frozenset[str] = frozenset()
    """Keys of `raw` that the file does not have, and whose values are the tool's defaults."""
    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    """What has to be settled before the experiment runs."""
    current: str = ""
    """The key whose rule is being applied."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the other tool's value, or `default` if it is absent or empty."""
        value = self.raw.get(key)
        return default if value is None or value == "" else value

    def put(self, key: str, value: Any) -> None:
        """Set dstune's `key`, and note that the current key became it."""
        self.values[key] = value
        self.note(key)

    def choose(self, group: str, choice: str) -> None:
        """Choose an option of one of dstune's configuration groups, and note that the current key became it."""
        self.choices[group] = choice
        self.note(group)

    def note(self, key: str) -> None:
        """Note that the current key became dstune's `key`."""
        names = self.carried.setdefault(self.current, [])
        if key not in names:
            names.append(key)

    def drop(self, reason: str, kind: str = NOT_SUPPORTED, key: str | None = None) -> None:
        """Report that the current key (or `key`) cannot be carried, or not exactly. A tool's own defaults are not reported."""
        name = self.current if key is None else key
        if name in self.defaults:
            return
        if earlier := self.dropped.get(name):
            kind, reason = earlier.kind, f"{earlier.reason}; {reason}"
        secret = re.search(r"token|key|secret|password", name) is not None
        self.dropped[name] = Dropped(kind, reason, "..." if secret else self.raw.get(name))

    def refuse(self, reason: str, fix: str) -> None:
        """Report that the current key decides something that the user has to give: the import ends with exit code 2."""
        value = self.raw.get(self.current)
        problem = Problem(self.current, reason, fix, "" if isinstance(value, (dict, list)) else str(value))
        if all(problem.reason != earlier.reason for earlier in self.problems):
            self.problems.append(problem)

    def assume(self, text: str) -> None:
        """Report an assumption that the user should check."""
        if text not in self.assumed:
            self.assumed.append(text)
