"""What a case is, and what it may show.

A case is run by all ranks at once. It has a name, a group (cases of a group share a process of each rank), a reason why it cannot
run here, and `run`, which returns the outcome of this rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from dstune_verify.world import World

RIGHT, WRONG, CRASHED, NOT_RUN = "right", "wrong", "crashed", "not run"
STATUSES = (RIGHT, WRONG, CRASHED, NOT_RUN)
"""`crashed`: an error, a dead process or no end in time. `not run`: the environment lacks what the case needs."""


@dataclass(frozen=True)
class Outcome:
    """What a case showed."""

    case: str
    status: str
    detail: str = ""
    """What is wrong, or why it did not run."""
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class CannotRun(Exception):
    """The environment lacks what a case needs, which only its run shows. All ranks must raise it alike."""


class Case(Protocol):
    """What the runner needs of a case."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str:
        """Cases of a group share a process of each rank."""

    @property
    def seconds(self) -> float:
        """Time limit on an idle machine."""

    @property
    def short(self) -> bool:
        """Whether the case belongs to the short form."""

    def missing(self, device: str) -> str:
        """Return why the case cannot run on devices of this type, in this environment; empty if it can."""

    def run(self, world: World) -> Outcome:
        """Run the case in this rank and return its outcome."""


def installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True)
class CheckCase:
    """A case that is a function: it returns what is wrong, empty if nothing is, and figures."""

    name: str
    group: str
    function: Callable[[World], tuple[str, dict[str, float], dict[str, float]]]
    needs: Callable[[str], str] = lambda device: ""
    short: bool = False
    seconds: float = 60

    def missing(self, device: str) -> str:
        return self.needs(device)

    def run(self, world: World) -> Outcome:
        wrong, errors, bounds = self.function(world)
        return Outcome(self.name, WRONG if wrong else RIGHT, wrong, errors, bounds)
