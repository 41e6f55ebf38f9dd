"""The state of a run's nodes, which its leader writes to a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core.parsing import read_object
from dstune.core.text import one_line

GROUP_FILE = Path("launch") / "agents.json"


@dataclass(frozen=True)
class GroupStatus:
    """Which nodes train, wait as spares or are lost, and how often all ranks have been restarted."""

    generation: int
    leader: str
    training: list[str]
    spare: list[str]
    lost: list[str]
    restarts: int
    is_over: bool

    def __str__(self) -> str:
        parts = [
            f"{state} {', '.join(nodes)}" for state, nodes in (("spare", self.spare), ("lost", self.lost)) if nodes
        ]
        training = f"training on {', '.join(self.training)}" if self.training else "no node is training"
        restarts = f"{self.restarts} restart{'s' * (self.restarts != 1)}"
        return "; ".join([training, *parts, f"led by {self.leader}", restarts])


def read_group(run_dir: Path) -> GroupStatus | None:
    """Return the state that the leader wrote last; None if the run has no agents or the file is malformed."""
    values: dict[str, Any] = read_object(run_dir / GROUP_FILE) or {}
    try:
        status = GroupStatus(**values)
    except TypeError:
        return None
    lists = (status.training, status.spare, status.lost)
    nodes = [node for nodes in lists if isinstance(nodes, list) for node in nodes]
    names = [*nodes, status.leader]
    has_names = all(isinstance(nodes, list) for nodes in lists) and all(isinstance(name, str) for name in names)
    has_numbers = type(status.generation) is int and type(status.restarts) is int and isinstance(status.is_over, bool)
    is_valid = has_names and has_numbers and all(one_line(name) == name for name in names)
    return status if is_valid else None
