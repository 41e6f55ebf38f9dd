"""What a launcher is: how the ranks of one run come to be on one machine or several, and how they are asked to stop."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from dstune.core.errors import DstuneError, Problem

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.launch.console import Console


@dataclass(frozen=True)
class LaunchConfig:
    """Base of every launcher's configuration: fields of a subclass become keys `launch.FIELD`."""

    absent_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keys that other launchers have and this one does not, by name, with the reason."""
    name: str = ""
    export_env: list[str] = field(default_factory=list)
    """Further environment variables that the ranks inherit, beside the built-in list."""
    hardware: str | None = None
    """GPUs of a node, such as 8xH100, for which `zero.stage=auto` chooses when the run is launched. If unset: those of this
    machine with launch=local, else the first node chooses when the ranks start."""


@dataclass(frozen=True)
class LaunchRequest:
    """The ranks that a launcher starts."""

    run: RunConfig
    run_dir: Path
    """Holds `run.yaml`."""
    console: Console
    lock: int | None = None
    """Descriptor of the run directory's lock, held as long as a rank lives."""
    command: Sequence[str] | None = None
    """The module that each rank runs and its arguments; training's when not given."""
    saves: bool = True
    """Whether ranks that are asked to stop have something to save."""


PASS, WARN, FAIL, SKIP = "pass", "warn", "fail", "skip"


@dataclass(frozen=True)
class Check:
    """One line of `dstune doctor`."""

    name: str
    status: str
    """`PASS`, `WARN`, `FAIL` or `SKIP`."""
    detail: str
    fix: str = ""


class Unreachable(DstuneError):
    """A queue does not answer now, which says nothing about its jobs."""


class Job(Protocol):
    """A job in a queue. As text: what it does now, for the console."""

    @property
    def id(self) -> str: ...
    @property
    def is_waiting(self) -> bool: ...


class Queue:
    """Where a launcher's runs wait for machines, and go on without the process that submitted them."""

    name: ClassVar[str]
    job: ClassVar[re.Pattern[str]] = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@\[\]-]*")
    """What the ids of its jobs look like. They are read from `launch.json`, which a stranger may have written, and end up on
    the command lines of the queue's programs: no id is an option or has spaces in it."""
    variables: ClassVar[frozenset[str]] = frozenset()
    """Of the environment, which the queue's own commands need."""

    def require(self, *, cancel: bool = False) -> None:
        """Raises UserError where jobs cannot be submitted, or cancelled, from this machine."""
        raise NotImplementedError

    def alive(self, ids: Sequence[str]) -> Sequence[Job]:
        """Return the jobs that wait or run. Raises Unreachable."""
        raise NotImplementedError

    def named(self, name: str) -> Sequence[str]:
        """Return the jobs of this user that wait or run under a name (`run.name`): whoever submitted one may have been killed
        before its number came. Raises Unreachable."""
        return []

    def cancel(self, ids: Sequence[str]) -> None:
        """End the jobs at once. Raises Unreachable."""
        raise NotImplementedError

    def ask_to_stop(self, ids: Sequence[str], run_dir: Path) -> None:
        """Let a running job save and end, and take waiting ones out of the queue. Raises Unreachable."""
        raise NotImplementedError


class Launcher:
    """Base of every launcher. Subclasses set `Config` and register with `@dstune.launcher`.

    Three members make a launcher; everything else has a default:

    - `start(request)`: starts the ranks, waits for them and returns the exit code.
    - `check()`: refuses what is wrong with the configuration.
    - `probe(needed=...)`: says for `dstune doctor` whether its programs are installed.

    What few launchers do is an optional protocol: a launcher has its members or has not (`dstune.protocols.launcher_options`).
    """

    Config: ClassVar[type] = LaunchConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config

    def start(self, request: LaunchRequest) -> int:
        """Start the ranks and wait for them; return the exit code of the public contract.

        Raises:
            UserError: the ranks cannot be started, or they found a mistake of the user's.
        """
        raise NotImplementedError

    def check(self) -> Iterator[Problem]:
        """Yield what is wrong with the configuration beyond the range of each field."""
        return iter(())

    @classmethod
    def probe(cls, *, needed: bool) -> Iterator[Check]:
        """Yield whether this machine has what the launcher needs. needed: its absence is a failure and not a remark."""
        return iter(())

    # ---- traits ----

    here: ClassVar[bool] = False
    """The ranks run on this machine alone, and can share its devices with those of other runs."""
    queue: ClassVar[Queue | None] = None
    """Where its runs wait as jobs, if they do."""

    @property
    def ranks(self) -> int | None:
        """The number of ranks, where the configuration alone tells it."""
        return None

    @property
    def restarts(self) -> int:
        """How often a failed attempt is started again."""
        return 0

    @property
    def on_this_machine(self) -> bool:
        """Whether all ranks of this configuration run here, so that they see what is on this machine's disk."""
        return self.here

    @property
    def shared_folder(self) -> bool:
        """Whether other machines have to see the run directory."""
        return True

    # ---- what generic code asks of a configuration ----

    def nodes(self) -> int:
        """Return the number of machines, for `dstune plan`. Raises UserError where a file that lists them cannot be read."""
        return 1

    def to_measure(self) -> Any:
        """Return the configuration for a measurement between its ranks, or None where they cannot be started from here."""
        return self.config
