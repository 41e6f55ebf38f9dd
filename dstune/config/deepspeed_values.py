"""Holds what a DeepSpeed configuration sets, in dstune's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dstune.core.errors import Problem

AUTO = "auto"


@dataclass(frozen=True)
class Value:
    """One value that the file sets."""

    key: str
    """dstune's key, or the name of a group; then `value` is the choice."""
    value: Any
    source: str
    """The key of the file that sets it."""
    implied: bool = False
    """Whether it is DeepSpeed's default for `source`, which the file leaves out. A value that the user gives takes precedence."""
    excluded: bool = False
    """Whether the file only rules this value out, and leaves the choice among the others to dstune's key."""
    note: str = ""
    """What the origin of an implied value says beside that."""


@dataclass
class Content:
    """The content of a file, translated into dstune's keys."""

    values: list[Value] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """Values that dstune has no key for, nested as in DeepSpeed's configuration."""
    accumulation: Value | None = None
    """Micro-batches of a rank in one step; None if the file does not decide it."""
    derives_micro_batch: bool = False
    """Whether the rows of a micro-batch follow from the batch, `accumulation` and the ranks, as the file leaves them out."""
    start_rate: Value | None = None
    """Learning rate that the schedule begins with. Its share of the peak is known when the peak is."""
    leaves_schedule: bool = False
    """Whether the file sets neither rate nor schedule, as both are the script's business."""
    processes: int | None = None
    """Ranks on this machine, which only accelerate's files contain. `launch.processes`, if given, takes precedence."""
    problems: list[Problem] = field(default_factory=list)

    def drop(self, key: str) -> None:
        """Remove the values of `key`."""
        self.values = [value for value in self.values if value.key != key]


def whole_number(value: Any) -> Any:
    """Return a float such as JSON's 5e8 as a whole number; everything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def section_of(raw: Mapping[str, Any], name: str) -> Any:
    """Return a section of the file: a mapping or `auto`; empty if it is absent or something else."""
    value = raw.get(name)
    return value if isinstance(value, Mapping) or value == AUTO else {}
