"""Keys of launchers that run an agent on each node."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.launcher import LaunchConfig


@dataclass(frozen=True)
class AgentsConfig(LaunchConfig):
    restarts: int = setting(0, at_least=0)
    """How often all ranks are restarted from the newest complete checkpoint after a rank or node was lost; the same failure of
    a rank at the same step twice ends the run."""
    min_nodes: int | None = setting(None, at_least=1, example="1", needs="launch.restarts=3")
    """Fewest nodes that training continues with after others were lost; all nodes by default. Needs `launch.restarts`."""
    spares: int = setting(0, at_least=0)
    """Additional nodes that wait to replace lost ones. Needs `launch.restarts`."""
    warm: bool = True
    """With `launch.restarts`, fork the ranks of each node from a process that has already done their imports; `false` starts each
    rank as a new process."""
    silence_seconds: float = setting(15.0, at_least=3.0)
    """Seconds of silence after which a node counts as lost; a node whose connection breaks counts at once."""
