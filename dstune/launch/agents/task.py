"""The task that an agent receives when it starts: on its command line from the script of a SLURM job, or over ssh from
`launch=hostfile`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

REQUEUED_REJOIN_SECONDS = 30.0
"""How long a job with too few nodes waits for lost ones, if the queue can replace them."""


@dataclass(frozen=True)
class Settings:
    """Settings that all agents of a run share: `launch.restarts` and the other keys of `dstune.launch.agents.config`."""

    nodes: int
    """Nodes that train together."""
    expected: int
    """Nodes that start, spares included."""
    min_nodes: int
    restarts: int
    silence_seconds: float
    grace_seconds: float
    requeues: bool = False
    """Whether a run with too few nodes goes back to a queue, which replaces the lost ones."""
    interface: str | None = None
    signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGINT", "SIGUSR1"])
    """Signals that ask the run to save and exit (`run.signals`)."""
    saves: bool = True
    """Whether ranks that are asked to stop have something to save."""
    warm: bool = True
    """Whether ranks are forked from a process that has already done their imports (`launch.warm`)."""
    imports: list[str] = field(default_factory=list)
    """Modules that this process imports in addition to those of every rank."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """What one agent does."""

    run_dir: str
    command: list[str]
    """The module that each rank runs, and its arguments."""
    settings: Settings
    node: str
    order: int
    """Position among the nodes: the first one leads, the last ones are spares."""
    ranks: int
    launch: str
    """Identity of this launch, the same for all its agents."""
    secret: str
    """Secret that only the agents of the run know."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank, in addition to the agent's own environment."""
    first_variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of rank 0 alone."""
    folder: str | None = None
    """Folder that relative paths of the configuration start from; the agent's own when not given."""
    batch_node: str = ""
    """Node that runs the script of a SLURM job."""
    unset: list[str] = field(default_factory=list)
    """Environment variables of the agent that no rank inherits."""


def task_from_json(values: dict[str, Any]) -> Task:
    """Return the task that `asdict` turned into the JSON object `values`."""
    return Task(**{**values, "settings": Settings(**values["settings"])})
