"""What a tracker is: a service or file format that gets a run's metrics beside `metrics.jsonl` and the console."""

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
    """Everything about one step."""

    step: int
    metrics: Mapping[str, Any]
    """Numbers and texts by name; null for a number that is not finite."""
    time: float
    """When the step was done, in seconds since the epoch."""
    samples: tuple[Mapping[str, Any], ...] = ()
    """Where prompts were answered at this step: all answers so far, each with its step."""


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

    The methods from `start` on are called on rank 0 from one thread, in this order; they may raise anything, which turns the
    tracker off. Import its client there.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type | None] = None
    """Its keys, `tracking.NAME.KEY`: a frozen dataclass whose defaults turn the tracker off."""
    switch: ClassVar[str] = ""
    """Of a tracker without `Config`: the documentation of `tracking.NAME`, true or false, which turns it on."""
    title: ClassVar[str] = ""
    """Its name in messages."""
    variables: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the environment variables that it reads; only rank 0 gets the secret ones."""
    rebuilds: bool = False
    """Whether every launch writes the whole run anew, from the files of the run directory. Another tracker goes on where it
    was, and can add nothing to a step that it has. Known once `start` is done."""

    def __init__(self, config: RunConfig, run_dir: Path, warn: Callable[[str], None], *, fresh: bool):
        """fresh: the run starts at step 0."""
        self._config, self._run_dir, self._warn, self._fresh = config, run_dir, warn, fresh

    @classmethod
    def enabled(cls, tracking: TrackingConfig) -> bool:
        """Return whether the configuration turns it on; a tracker with keys says when."""
        return getattr(tracking, cls.name, False) is True

    @classmethod
    def names(cls, tracking: TrackingConfig) -> Mapping[str, str | None]:
        """Return keys whose values are names that it displays, with the values: nothing secret may be among them."""
        return {}

    @classmethod
    def needs_variables(cls, tracking: TrackingConfig) -> bool:
        """Return whether rank 0 has to get `variables`."""
        return cls.enabled(tracking)

    @classmethod
    def check(cls, tracking: TrackingConfig) -> Iterator[Problem]:
        """Yield what is wrong with its keys."""
        yield from ()

    @classmethod
    def without_effect(cls, tracking: TrackingConfig) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (key, (reason, what would let it count)) of every key that another one overrules."""
        yield from ()

    @classmethod
    def missing(cls, tracking: TrackingConfig) -> Iterator[Problem]:
        """Yield what has to be installed first, found without importing it."""
        yield from ()

    @classmethod
    def probe(cls) -> Iterator[Check]:
        """Yield what `dstune doctor` finds of it on this machine. No server is asked."""
        yield from ()

    def start(self, past: Iterator[Row]) -> None:
        """Begin, or go on where an earlier launch of the run ended. past: the rows of the steps before this launch's
        first one, from the files of the run directory. Whatever is missing of them is to be written, and nothing else
        is to be there: rows of an earlier launch beyond its last checkpoint come again."""
        raise NotImplementedError

    def location(self) -> str:
        """Say where a person sees the run, as an address or a command, with nothing secret in it. It is printed after `start`."""
        return ""

    def write(self, row: Row) -> None:
        """Write the row of one step; steps only rise."""
        raise NotImplementedError

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the run's result: the keys of `result.json`."""
        raise NotImplementedError

    def finish(self, status: str) -> None:
        """Close; `status` is that of `result.json`."""
        raise NotImplementedError
