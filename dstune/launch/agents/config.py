"""Keys of launchers whose nodes have agents."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.launcher import LaunchConfig


@dataclass(frozen=True)
class AgentsConfig(LaunchConfig):
    restarts: int = setting(0, at_least=0)
    """How often all ranks start again from the newest complete checkpoint after a rank or node was lost; the same failure
    of a rank at the same step twice ends the run."""
    min_nodes: int | None = setting(None, at_least=1)
    """Fewest nodes that go on after others were lost; if not given, all nodes are needed. Needs `launch.restarts`."""
    spares: int = setting(0, at_least=0)
    """Further nodes that wait, and take the place of lost ones. Needs `launch.restarts`."""
    warm: bool = True
    """With `launch.restarts`, fork the ranks of each node from a process that has done their imports; `false` starts each rank
    anew."""
    silence_seconds: float = setting(15.0, at_least=3.0)
    """A node counts as lost once it has been silent for so long; a broken connection counts at once."""
