"""launch=openmpi: ranks started by Open MPI's mpirun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.convert import format_value
from dstune.core.errors import Problem, UserError
from dstune.launch.on_hosts import OnHosts
from dstune.launch.openmpi.config import OpenMpiConfig
from dstune.protocols import launcher
from dstune.protocols.launcher import Check

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.launch.console import Console
    from dstune.launch.remote_commands import RemotePlan


@launcher
class OpenMpi(OnHosts):
    Config = OpenMpiConfig
    config: OpenMpiConfig

    def check(self) -> Iterator[Problem]:
        launch = self.config
        yield from super().check()
        if launch.hostfile is None:
            for key in ("include", "exclude", "user", "port"):
                if (value := getattr(launch, key)) is not None:
                    reason = "only valid with launch.hostfile"
                    yield Problem(
                        f"launch.{key}", reason, "launch.hostfile=hosts, or leave it out", format_value(value)
                    )
        elif launch.processes is not None:
            reason = "the slots of the hostfile are the ranks"
            yield Problem(
                "launch.processes", reason, "leave it out, or change the slots", format_value(launch.processes)
            )

    @property
    def restarts(self) -> int:
        return self.config.restarts

    def slots(self) -> dict[str, list[int]]:
        slots_by_host = super().slots()
        for host, host_slots in slots_by_host.items():
            if host_slots != list(range(len(host_slots))):
                key = "include" if self.config.include else "exclude"
                reason = f"mpirun always uses the first slots of a host, so it cannot use slots {host_slots} of {host}"
                fix = "use launch=hostfile, which can choose slots, or give hosts without slot numbers"
                raise UserError(Problem(f"launch.{key}", reason, fix, getattr(self.config, key)))
        return slots_by_host

    def plan(self, run: RunConfig, run_dir: Path, launch_id: str, console: Console) -> RemotePlan:
        from dstune.launch.openmpi.nodes import plan

        return plan(self, run, run_dir, launch_id, console)

    @classmethod
    def probe(cls, *, needed: bool) -> Iterator[Check]:
        from dstune.launch.openmpi.nodes import probe

        yield probe(needed=needed)
