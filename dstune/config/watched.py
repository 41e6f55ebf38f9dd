"""A view of a configuration that records whether a doubtful value was read.

If one key is misspelled, rules that never read that key still give valid answers, and the user gets all of them at once instead of
one command after another. Watching a rule shows which keys it reads, so no rule has to declare them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, is_dataclass
from typing import Any, cast

from dstune.config.schema import CHOICES, RunConfig


@dataclass
class Reads:
    """What a rule has read so far."""

    doubtful_value: bool = False


def watched(config: RunConfig, doubtful: Collection[str]) -> tuple[Reads, RunConfig]:
    """Return a view of `config` that behaves like it, and the record of what is read through the view.

    doubtful: keys and sections whose values are doubtful; the empty name stands for all of them.
    """
    reads = Reads()
    return reads, cast(RunConfig, _View(config, "", doubtful, reads))


class _View:
    """A view of one section; `isinstance` and `match` see the section's own class."""

    def __init__(self, section: Any, path: str, doubtful: Collection[str], reads: Reads):
        self.__dict__.update(_section=section, _path=path, _doubtful=doubtful, _reads=reads)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._section)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._section, name)
        key = f"{self._path}.{name}" if self._path else name
        if self._is_doubtful(key, reads_value=not is_dataclass(value)):
            self._reads.doubtful_value = True
        return _View(value, key, self._doubtful, self._reads) if is_dataclass(value) else value

    def _is_doubtful(self, key: str, reads_value: bool) -> bool:
        """Return whether reading `key` reads something doubtful. reads_value: false for a section, of which only the class is
        read."""
        return any(
            name in ("", key) or key.startswith(f"{name}.") or (reads_value and name.startswith(f"{key}."))
            for name in self._doubtful
            if reads_value or name in CHOICES or name == ""
        )
