"""Base of the launchers that start ranks on the hosts of a file, over ssh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.core.errors import Problem
from dstune.launch import host_slots
from dstune.protocols import Launcher
from dstune.protocols.launcher import Check, LaunchRequest
from dstune.protocols.launcher_options import ChecksMachines

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.launch.console import Console
    from dstune.launch.remote_commands import RemotePlan


class OnHosts(Launcher, ChecksMachines):
    config: Any

    def check(self) -> Iterator[Problem]:
        if self.config.include and self.config.exclude:
            reason = "it cannot be combined with launch.include"
            yield Problem("launch.exclude", reason, "leave one of them out", self.config.exclude)

    @property
    def shared_folder(self) -> bool:
        return bool(self.config.hostfile)

    def slots(self) -> dict[str, list[int]]:
        """Return the slots that the run uses, by host: those of the hostfile, after include and exclude. Raises UserError."""
        config = self.config
        return host_slots.select_slots(host_slots.read_hostfile(config.hostfile), config.include, config.exclude)

    def nodes(self) -> int:
        return 1 if self.config.hostfile is None else len(self.slots())

    def plan(self, run: RunConfig, run_dir: Path, launch_id: str, console: Console) -> RemotePlan:
        """Check the hosts, and return what to start on them. Raises UserError."""
        raise NotImplementedError

    def start(self, request: LaunchRequest) -> int:
        from dstune.launch import remote

        run, run_dir, console = request.run, request.run_dir, request.console

        def plan_attempt(launch_id: str) -> RemotePlan:
            plan = self.plan(run, run_dir, launch_id, console)
            if request.command is None:
                return plan
            return replace(plan, argv=(*plan.argv[: plan.argv.index("dstune.worker")], *request.command))

        return remote.run(run, run_dir, self.config, plan_attempt, console, self.restarts)

    def checks(self) -> Iterator[Check]:
        """Yield for each host whether it is reachable, with the same versions and files and a synchronised clock."""
        if self.config.hostfile is None:
            return
        from dstune.launch.host_checks import host_checks

        yield from host_checks(self.config)
