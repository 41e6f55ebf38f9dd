"""What an agent is told when it starts: by the script of a SLURM job on its command line, by `launch=hostfile` over ssh."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

REQUEUED_REJOIN_SECONDS = 30.0
"""How long too few nodes of a job wait for lost ones, where the queue can give it others."""


@dataclass(frozen=True)
class Settings:
    """What is the same for all agents of a run: the keys `launch.restarts` and so on, see `dstune.launch.agents.config`."""

    nodes: int
    """Nodes that train together."""
    expected: int
    """Nodes that start, spares included."""
    min_nodes: int
    restarts: int
    silence_seconds: float
    grace_seconds: float
    requeues: bool = False
    """Whether a run that has too few nodes goes back into a queue, which gives it others."""
    interface: str | None = None
    signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGINT", "SIGUSR1"])
    """Those that ask the run to save and leave (`run.signals`)."""
    saves: bool = True
    """Whether ranks that are asked to stop have something to save."""
    warm: bool = True
    """Whether ranks are forked from a process that has done their imports (`launch.warm`)."""
    imports: list[str] = field(default_factory=list)
    """Modules that such a process imports beside those of every rank."""

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
    """Place among the nodes: the first one leads, the last ones are spares."""
    ranks: int
    launch: str
    """Identity of this start of all agents."""
    secret: str
    """What all agents of the run know and nobody else."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of every rank, beside the agent's own environment."""
    first_variables: dict[str, str] = field(default_factory=dict)
    """Of rank 0 alone."""
    folder: str | None = None
    """Where relative paths of the configuration begin; the agent's own folder when not given."""
    batch_node: str = ""
    """Of a SLURM job, the node that runs its script."""
    unset: list[str] = field(default_factory=list)
    """Variables of the agent that no rank gets."""


def task_of(values: dict[str, Any]) -> Task:
    """Return the task in the object that a launch sent."""
    return Task(**{**values, "settings": Settings(**values["settings"])})
