"""launch=local: ranks on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.fields import setting
from dstune.errors import Problem
from dstune.protocols import Launcher, launcher
from dstune.protocols.launcher import LaunchConfig

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.launch.console import Console


@dataclass(frozen=True)
class LocalConfig(LaunchConfig):
    """Ranks on this machine, started and supervised by dstune itself."""

    name: str = "local"
    processes: int | None = setting(None, at_least=1)
    """Ranks; every GPU when not given, else two (one on a single core)."""
    restarts: int = setting(0, at_least=0)
    """How often a run that failed starts again from its newest whole checkpoint; the same failure at the same step twice
    ends it."""
    grace_seconds: float = setting(5.0, above=0.0, at_most=8.0)
    """How long the other ranks may take to end after one of them died; then they are killed."""
    in_process: bool = False
    """Train in the process that was started, so that breakpoints work: with `launch.processes=1` only."""


@launcher
class Local(Launcher):
    Config = LocalConfig
    config: LocalConfig
    here = True
    shared_folder = False

    def check(self) -> Iterator[Problem]:
        if not self.config.in_process:
            return
        if self.config.processes != 1:
            processes = self.config.processes
            reason = "one process can hold one rank only"
            value = "as many as there are GPUs, or two" if processes is None else str(processes)
            yield Problem("launch.in_process", reason, "launch.processes=1", f"launch.processes: {value}")
        if self.config.restarts:
            reason = "the process that failed is the one that would start it again"
            yield Problem("launch.in_process", reason, "launch.restarts=0", f"launch.restarts={self.config.restarts}")

    @property
    def ranks(self) -> int | None:
        return self.config.processes

    def start(
        self,
        run: RunConfig,
        run_dir: Path,
        *,
        console: Console,
        lock: int | None = None,
        command: Sequence[str] | None = None,
        saves: bool = True,
    ) -> int:
        if self.config.in_process and command is None:
            from dstune.launch.local import in_process

            return in_process.run(run, run_dir)
        from dstune.launch.commands import local_plan
        from dstune.launch.local import supervise

        plan = local_plan(run, run_dir, console=console.kind)
        if command is not None:
            words = (*plan.argv[0][: plan.argv[0].index("dstune.worker")], *command)
            plan = replace(plan, argv=(words,) * plan.size)
        return supervise.run(run, run_dir, self.config, plan=plan, console=console, lock=lock, saves=saves)
