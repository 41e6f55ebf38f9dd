"""launch=local: ranks on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dstune.core.errors import Problem
from dstune.launch.local.config import LocalConfig
from dstune.protocols import Launcher, launcher
from dstune.protocols.launcher import LaunchRequest


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
            reason = "one process can run only one rank"
            value = "one per GPU, or two without GPUs" if processes is None else str(processes)
            yield Problem("launch.in_process", reason, "launch.processes=1", f"launch.processes: {value}")
        if self.config.restarts:
            reason = "a process that fails cannot restart itself"
            yield Problem("launch.in_process", reason, "launch.restarts=0", f"launch.restarts={self.config.restarts}")

    @property
    def restarts(self) -> int:
        return self.config.restarts

    @property
    def ranks(self) -> int | None:
        return self.config.processes

    def start(self, request: LaunchRequest) -> int:
        run, run_dir, console = request.run, request.run_dir, request.console
        if self.config.in_process:
            from dstune.launch.local import in_process

            if request.command is None:
                return in_process.run(run, run_dir)
            return in_process.call(run, run_dir, request.command, console)
        from dstune.launch.commands import local_plan
        from dstune.launch.local import supervise

        plan = local_plan(run, run_dir, console=console.kind)
        if request.command is not None:
            argv = (*plan.argv[0][: plan.argv[0].index("dstune.worker")], *request.command)
            plan = replace(plan, argv=(argv,) * plan.size)
        return supervise.run(
            run, run_dir, self.config, plan=plan, console=console, lock=request.lock, saves=request.saves
        )
