"""launch=local: ranks on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.fields import setting
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


@launcher
class Local(Launcher):
    Config = LocalConfig
    config: LocalConfig
    here = True
    shared_folder = False

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
        from dstune.launch.commands import local_plan
        from dstune.launch.local import supervise

        plan = local_plan(run, run_dir, console=console.kind)
        if command is not None:
            words = (*plan.argv[0][: plan.argv[0].index("dstune.worker")], *command)
            plan = replace(plan, argv=(words,) * plan.size)
        return supervise.run(run, run_dir, self.config, plan=plan, console=console, lock=lock, saves=saves)
