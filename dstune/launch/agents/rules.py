"""Rules of the keys that launchers with agents share."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.core.errors import Problem
from dstune.launch.agents.config import AgentsConfig


def check_agents(launch: AgentsConfig) -> Iterator[Problem]:
    """Yield problems that the keys have whatever the number of nodes is."""
    for key in ("min_nodes", "spares"):
        if (value := getattr(launch, key)) and not launch.restarts:
            reason = "without launch.restarts a run ends when it loses a node"
            yield Problem(f"launch.{key}", reason, "launch.restarts=3 with it, or leave it out", str(value))


def check_nodes(launch: AgentsConfig, nodes: int, key: str) -> Iterator[Problem]:
    """Yield problems with the number of nodes that train. key: the key that gives it."""
    if launch.min_nodes and launch.min_nodes > nodes:
        reason = f"{key} gives the run {nodes} node{'s' * (nodes > 1)}"
        yield Problem("launch.min_nodes", reason, f"at most {nodes}", str(launch.min_nodes))
