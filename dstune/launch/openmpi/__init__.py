"""launch=openmpi: ranks started by Open MPI's mpirun."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.convert import shown
from dstune.config.fields import setting
from dstune.errors import Problem
from dstune.launch.on_hosts import OnHosts, OnHostsConfig
from dstune.protocols import launcher
from dstune.protocols.launcher import Check

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.launch.console import Console
    from dstune.launch.remote_commands import RemotePlan


@dataclass(frozen=True)
class OpenMpiConfig(OnHostsConfig):
    """Ranks started by Open MPI's mpirun, on this machine or on the hosts of a file."""

    name: str = "openmpi"
    processes: int | None = setting(None, at_least=1)
    """Ranks on this machine; every GPU when not given, else two. With a hostfile its slots are the ranks."""
    hostfile: str | None = None
    """File with one `HOST slots=N` a line; this machine alone when not given."""
    user: str | None = None
    """Name to log in with."""
    interface: str | None = None
    """Network interface that mpirun and the ranks talk over, such as ib0."""
    mpirun: str = "mpirun"
    """The program, where it is not the first of that name."""
    mpirun_options: list[str] = setting([])
    """Further options of mpirun."""
    grace_seconds: float = setting(10.0, above=0.0)
    """How long the ranks may take to end after one of them died; then they are killed."""


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
                    yield Problem(f"launch.{key}", reason, "launch.hostfile=hosts, or leave it out", shown(value))
        elif launch.processes is not None:
            reason = "the slots of the hostfile are the ranks"
            yield Problem("launch.processes", reason, "leave it out, or change the slots", shown(launch.processes))

    def plan(self, run: RunConfig, run_dir: Path, launch_id: str, console: Console) -> RemotePlan:
        from dstune.launch.openmpi.nodes import plan

        return plan(self, run, run_dir, launch_id, console)

    @classmethod
    def probe(cls, *, needed: bool) -> Iterator[Check]:
        from dstune.launch.openmpi.nodes import probe

        yield probe(needed=needed)
