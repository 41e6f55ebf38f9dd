"""launch=local: ranks on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.core.errors import Problem
from dstune.launch.local.config import LocalConfig
from dstune.protocols import Launcher, launcher

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.launch.console import Console


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
    def restarts(self) -> int:
        return self.config.restarts

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
        if self.config.in_process:
            from dstune.launch.local import in_process

            return in_process.run(run, run_dir) if command is None else in_process.call(run, run_dir, command, console)
        from dstune.launch.commands import local_plan
        from dstune.launch.local import supervise

        plan = local_plan(run, run_dir, console=console.kind)
        if command is not None:
            words = (*plan.argv[0][: plan.argv[0].index("dstune.worker")], *command)
            plan = replace(plan, argv=(words,) * plan.size)
        return supervise.run(run, run_dir, self.config, plan=plan, console=console, lock=lock, saves=saves)
