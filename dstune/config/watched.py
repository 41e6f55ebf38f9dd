"""A configuration that notes when a doubtful value is read.

Where one key is misspelled, rules that never look at that key can still be judged, and the user gets all answers at once
instead of one command after another. Which keys a rule reads is found by watching it, so no rule has to declare it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, is_dataclass
from typing import Any, cast

from dstune.config.schema import CHOICES, RunConfig


@dataclass
class Seen:
    """What a rule has looked at so far."""

    doubt: bool = False


def watched(config: RunConfig, doubtful: Collection[str]) -> tuple[Seen, RunConfig]:
    """Return a view of `config` that reads like it, and the record of what is read through it. The empty name makes all
    doubtful."""
    seen = Seen()
    return seen, cast(RunConfig, _View(config, "", doubtful, seen))


class _View:
    """One section; `isinstance` and `match` see the section's own class."""

    def __init__(self, section: Any, path: str, doubtful: Collection[str], seen: Seen):
        self.__dict__.update(_section=section, _path=path, _doubtful=doubtful, _seen=seen)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._section)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._section, name)
        key = f"{self._path}.{name}" if self._path else name
        if self._in_doubt(key, whole=not is_dataclass(value)):
            self._seen.doubt = True
        return _View(value, key, self._doubtful, self._seen) if is_dataclass(value) else value

    def _in_doubt(self, key: str, whole: bool) -> bool:
        """Return whether reading `key` reads something doubtful; of a section as such (`whole` false) only its class is read."""
        return any(
            name in ("", key) or key.startswith(f"{name}.") or (whole and name.startswith(f"{key}."))
            for name in self._doubtful
            if whole or name in CHOICES or name == ""
        )
