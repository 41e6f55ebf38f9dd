"""Optional protocols for abilities that few launchers have. Generic code asks `isinstance(launcher, SubmitsRuns)`, never for a
class.

A launcher implements all members of a protocol or none. To write only some, derive from the protocol, which has a default for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    from dstune.config.schema import RunConfig
    from dstune.core.errors import Problem
    from dstune.launch.console import Console
    from dstune.protocols.launcher import Check


@runtime_checkable
class SubmitsRuns(Protocol):
    """A launcher that can submit runs to its `queue` and return."""

    @property
    def waits(self) -> bool:
        """Whether `start` returns only when the run is over."""
        return True

    def array_problems(self) -> Iterator[Problem]:
        """Yield why the trials of a sweep cannot be submitted together. Only called if `waits` is false."""
        return iter(())

    def submit_array(
        self, sweep: RunConfig, folder: Path, runs: Sequence[tuple[RunConfig, Path]], console: Console
    ) -> list[str]:
        """Submit the trials `runs` of the sweep in `folder` together; return the job id of each. Raises UserError."""
        raise NotImplementedError


@runtime_checkable
class ChecksMachines(Protocol):
    """A launcher whose configuration names machines."""

    def checks(self) -> Iterator[Check]:
        """Yield a line of `dstune doctor` for each requirement on these machines."""
        return iter(())


LAUNCHER_OPTIONS = (SubmitsRuns, ChecksMachines)
