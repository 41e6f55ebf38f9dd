"""launch=hostfile: ranks on the hosts of a file."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.core.errors import Problem, UserError
from dstune.launch.agents.rules import check_agents, check_nodes
from dstune.launch.hostfile.config import HostfileConfig
from dstune.launch.on_hosts import OnHosts
from dstune.protocols import launcher
from dstune.protocols.launcher import Check, LaunchRequest


@launcher
class Hostfile(OnHosts):
    Config = HostfileConfig
    config: HostfileConfig

    def check(self) -> Iterator[Problem]:
        if not (self.config.hostfile or "").strip():
            fix = "launch.hostfile=hosts, with one `HOST slots=N` a line (launch/hostfile.example)"
            yield Problem("launch.hostfile", "there is no list of hosts", fix, format_value(self.config.hostfile))
        yield from super().check()
        yield from check_agents(self.config)

    def nodes(self) -> int:
        return max(1, super().nodes() - self.config.spares)

    @property
    def restarts(self) -> int:
        return self.config.restarts

    def slots(self) -> dict[str, list[int]]:
        """Return the slots of all hosts, spares included. Raises UserError where too few hosts would train."""
        slots, launch = super().slots(), self.config
        problems = []
        if launch.spares >= len(slots):
            reason = f"{len(slots)} host{'s' * (len(slots) > 1)} are there, and one has to train"
            problems.append(
                Problem("launch.spares", reason, "fewer, or more hosts in the hostfile", str(launch.spares))
            )
        else:
            problems += check_nodes(launch, len(slots) - launch.spares, "launch.hostfile without launch.spares")
        if problems:
            raise UserError(problems)
        return slots

    def start(self, request: LaunchRequest) -> int:
        import uuid

        from dstune.launch.hostfile.run import run as run_on_hosts

        return run_on_hosts(self, request, uuid.uuid4().hex)

    @classmethod
    def probe(cls, *, needed: bool) -> Iterator[Check]:
        from dstune.launch.checks import programs

        yield programs("hostfile", ("ssh",), "openssh-client", needed=needed)
