"""Defines a launcher: how it starts the ranks of a run on one or several machines, and asks them to stop."""

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
    """A request to start the ranks of a run."""

    run: RunConfig
    run_dir: Path
    """Contains `run.yaml`."""
    console: Console
    lock: int | None = None
    """Descriptor of the run directory's lock, which must be held as long as a rank lives."""
    command: Sequence[str] | None = None
    """The module that each rank runs and its arguments; by default, that of training."""
    saves: bool = True
    """Whether ranks save something when they are asked to stop."""


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
    """Raised if a queue does not answer at the moment; its jobs may still run."""


class Job(Protocol):
    """A job in a queue. `str(job)` describes its current state for the console."""

    @property
    def id(self) -> str: ...
    @property
    def is_waiting(self) -> bool: ...


class Queue:
    """A queue in which runs of a launcher wait for machines. Runs do not need the process that submitted them."""

    name: ClassVar[str]
    job: ClassVar[re.Pattern[str]] = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@\[\]-]*")
    """Pattern of its job ids. Ids are read from `launch.json`, which a stranger may have written, and passed to the queue's
    programs on their command lines: the pattern must match neither options nor spaces."""
    variables: ClassVar[frozenset[str]] = frozenset()
    """Environment variables that the queue's commands need."""

    def require(self, *, cancel: bool = False) -> None:
        """Raise UserError if jobs cannot be submitted from this machine. cancel: check instead whether they can be cancelled."""
        raise NotImplementedError

    def alive(self, ids: Sequence[str]) -> Sequence[Job]:
        """Return those of the jobs that are waiting or running. Raises Unreachable."""
        raise NotImplementedError

    def named(self, name: str) -> Sequence[str]:
        """Return this user's waiting and running jobs with a name (`run.name`), to find a job whose submitting process was killed
        before it received the job's id. Raises Unreachable."""
        return []

    def cancel(self, ids: Sequence[str]) -> None:
        """End the jobs at once. Raises Unreachable."""
        raise NotImplementedError

    def ask_to_stop(self, ids: Sequence[str], run_dir: Path) -> None:
        """Ask running jobs to save and end, and remove waiting ones from the queue. Raises Unreachable."""
        raise NotImplementedError


class Launcher:
    """Base of every launcher. Subclasses set `Config` and register with `@dstune.launcher`.

    Three members make a launcher; everything else has a default:

    - `start(request)`: starts the ranks, waits for them and returns the exit code.
    - `check()`: yields problems of the configuration.
    - `probe(needed=...)`: tells `dstune doctor` whether its programs are installed.

    Abilities that few launchers have are optional protocols (`dstune.protocols.launcher_options`).
    """

    Config: ClassVar[type] = LaunchConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config

    def start(self, request: LaunchRequest) -> int:
        """Start the ranks and wait for them; return the exit code of the public contract.

        Raises:
            UserError: the ranks cannot be started, or they found a mistake of the user.
        """
        raise NotImplementedError

    def check(self) -> Iterator[Problem]:
        """Yield problems of the configuration that the range checks of single fields do not cover."""
        return iter(())

    @classmethod
    def probe(cls, *, needed: bool) -> Iterator[Check]:
        """Yield whether this machine has the programs that the launcher needs. needed: whether their absence is a failure or a
        remark."""
        return iter(())

    # ---- traits ----

    here: ClassVar[bool] = False
    """The ranks run only on this machine, and can share its devices with other runs."""
    queue: ClassVar[Queue | None] = None
    """The queue in which its runs wait as jobs, if there is one."""

    @property
    def ranks(self) -> int | None:
        """The number of ranks; None if the configuration alone does not determine it."""
        return None

    @property
    def restarts(self) -> int:
        """How many times a failed attempt is restarted."""
        return 0

    @property
    def on_this_machine(self) -> bool:
        """Whether all ranks of this configuration run here, and thus see this machine's disk."""
        return self.here

    @property
    def shared_folder(self) -> bool:
        """Whether other machines must be able to access the run directory."""
        return True

    # ---- configurations for generic code ----

    def nodes(self) -> int:
        """Return the number of machines, for `dstune plan`. Raises UserError if a file that lists them cannot be read."""
        return 1

    def to_measure(self) -> Any:
        """Return the configuration for a measurement between the ranks; None if they cannot be started from here."""
        return self.config
