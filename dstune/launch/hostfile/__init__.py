"""launch=hostfile: ranks on the hosts of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.config.convert import format_value
from dstune.core.errors import Problem
from dstune.launch.hostfile.config import HostfileConfig
from dstune.launch.on_hosts import OnHosts
from dstune.protocols import launcher
from dstune.protocols.launcher import Check

if TYPE_CHECKING:
    from dstune.config.schema import RunConfig
    from dstune.launch.console import Console
    from dstune.launch.remote_commands import RemotePlan


@launcher
class Hostfile(OnHosts):
    Config = HostfileConfig
    config: HostfileConfig

    def check(self) -> Iterator[Problem]:
        if not (self.config.hostfile or "").strip():
            fix = "launch.hostfile=hosts, with one `HOST slots=N` a line (launch/hostfile.example)"
            yield Problem("launch.hostfile", "there is no list of hosts", fix, format_value(self.config.hostfile))
        yield from super().check()

    def plan(self, run: RunConfig, run_dir: Path, launch_id: str, console: Console) -> RemotePlan:
        from dstune.launch.hostfile.nodes import plan

        return plan(self, run, run_dir, launch_id, console)

    @classmethod
    def probe(cls, *, needed: bool) -> Iterator[Check]:
        from dstune.launch.checks import programs

        yield programs("hostfile", ("ssh", "pdsh"), "openssh-client pdsh", needed=needed)
