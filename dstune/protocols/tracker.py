"""Defines a tracker: a service or file format that gets a run's metrics in addition to `metrics.jsonl` and the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.core.errors import Problem

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.protocols.launcher import Check


@dataclass(frozen=True)
class Row:
    """Everything that is reported for one step."""

    step: int
    metrics: Mapping[str, Any]
    """Numbers and texts by name; None for a number that is not finite."""
    time: float
    """When the step ended, in seconds since the epoch."""
    samples: tuple[Mapping[str, Any], ...] = ()
    """If prompts were answered at this step: all answers so far, each with its step."""


@dataclass(frozen=True)
class TrackingConfig:
    """Keys that all trackers share; `dstune.config.schema.tracking_class` adds those of each one."""

    project: str = "dstune"
    """W&B project and MLflow experiment."""
    group: str | None = None
    """Group of runs that belong together."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run; a `${oc.env:NAME}` among them stays as written."""
    notes: str | None = None
    """A description of the run."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Tracker:
    """Base of every tracker. Subclasses register with `@dstune.tracker`.

    Rank 0 calls the methods from `start` on in one thread, in this order. Any exception turns the tracker off. Import its client
    inside these methods.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type | None] = None
    """Its keys `tracking.NAME.KEY`, as a frozen dataclass whose defaults turn the tracker off."""
    switch: ClassVar[str] = ""
    """For a tracker without `Config`: the documentation of `tracking.NAME`, true or false, which turns it on."""
    title: ClassVar[str] = ""
    """Its name in messages."""
    variables: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the environment variables that it reads; only rank 0 gets the secret ones."""
    rebuilds: bool = False
    """Whether every launch writes the complete run again, from the files of the run directory. Other trackers continue where they
    stopped, and cannot add to a step that they already have. Valid after `start`."""

    def __init__(self, config: RunConfig, run_dir: Path, warn: Callable[[str], None], *, fresh: bool):
        """fresh: the run starts at step 0."""
        self._config, self._run_dir, self._warn, self._fresh = config, run_dir, warn, fresh

    @classmethod
    def enabled(cls, tracking: TrackingConfig) -> bool:
        """Return whether the configuration turns it on. A tracker with keys must override this."""
        return getattr(tracking, cls.name, False) is True

    @classmethod
    def names(cls, tracking: TrackingConfig) -> Mapping[str, str | None]:
        """Return the keys whose values it displays as names, with these values. None of them may contain a secret."""
        return {}

    @classmethod
    def needs_variables(cls, tracking: TrackingConfig) -> bool:
        """Return whether rank 0 needs the environment variables of `variables`."""
        return cls.enabled(tracking)

    @classmethod
    def check(cls, tracking: TrackingConfig) -> Iterator[Problem]:
        """Yield problems of its keys."""
        yield from ()

    @classmethod
    def without_effect(cls, tracking: TrackingConfig) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (key, (reason, fix)) for every key that another one makes ineffective."""
        yield from ()

    @classmethod
    def missing(cls, tracking: TrackingConfig) -> Iterator[Problem]:
        """Yield a problem for each package that is not installed, without importing any."""
        yield from ()

    @classmethod
    def probe(cls) -> Iterator[Check]:
        """Yield the lines of `dstune doctor` about this tracker. Contacts no server."""
        yield from ()

    def start(self, past: Iterator[Row]) -> None:
        """Begin, or continue where an earlier launch of the run ended.

        past: the rows of all steps before this launch, from the files of the run directory. The tracker must write those that it
        lacks, and end up with no others: rows of an earlier launch after its last checkpoint are sent again.
        """
        raise NotImplementedError

    def location(self) -> str:
        """Return an address or a command that shows the run to a person, without secrets. It is printed after `start`."""
        return ""

    def write(self, row: Row) -> None:
        """Write the row of one step. Steps always increase."""
        raise NotImplementedError

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the run's result: the keys of `result.json`."""
        raise NotImplementedError

    def finish(self, status: str) -> None:
        """Close the run. status: as in `result.json`."""
        raise NotImplementedError
