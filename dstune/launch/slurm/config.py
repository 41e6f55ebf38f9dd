"""Keys of launch=slurm."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting
from dstune.launch.agents.config import AgentsConfig


class ContainerRuntime(Enum):
    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass(frozen=True)
class SlurmConfig(AgentsConfig):
    """A SLURM job, whose script is kept in the run directory."""

    name: str = "slurm"
    nodes: int = setting(1, at_least=1)
    """Nodes that train; `launch.spares` further ones wait."""
    processes: int | None = setting(None, at_least=1)
    """Ranks on each node; `launch.gpus` when not given, else 1."""
    gpus: int = setting(0, at_least=0)
    """GPUs on each node (`--gres=gpu:N`); 0 trains on CPUs."""
    cpus: int | None = setting(None, at_least=1)
    """CPU cores for each rank (`--cpus-per-task`)."""
    memory: str | None = None
    """Memory of each node (`--mem`), such as 64G; 0 is all of it."""
    partition: str | None = None
    """Partition (`--partition`)."""
    account: str | None = None
    """Account that is charged (`--account`)."""
    qos: str | None = None
    """Quality of service (`--qos`)."""
    constraint: str | None = None
    """Features that the nodes need (`--constraint`)."""
    time: str | None = None
    """Time limit (`--time`) such as 30, 1:30:00 or 2-12; the partition's own when not given."""
    signal_seconds: int = setting(120, at_least=1)
    """How long before the time limit the ranks are told to save."""
    requeue: bool = True
    """Put a job that ran out of time back into the queue to continue; SLURM does so itself when a node fails."""
    chain: int = setting(1, at_least=1)
    """Jobs submitted at once, each of which waits for the one before and continues: for clusters that forbid requeueing."""
    container: str | None = setting(None, signed=True)
    """Image in which the ranks run."""
    container_runtime: ContainerRuntime = ContainerRuntime.pyxis
    """`pyxis` (Enroot, through srun) or `apptainer`."""
    container_mounts: list[str] = setting([], signed=True)
    """Folders that the container sees beside the run directory, as FOLDER or FOLDER:THERE."""
    container_python: str = setting("python3", signed=True)
    """The interpreter inside the container that has dstune."""
    directives: list[str] = setting([], signed=True)
    """Further options of sbatch, such as [--exclusive, --mail-type=END]."""
    setup: list[str] = setting([], signed=True)
    """Shell lines before the ranks start, such as [module load cuda]."""
    srun_options: list[str] = setting([], signed=True)
    """Further options of srun, such as [--cpu-bind=cores]."""
    interface: str | None = None
    """Network interface that the ranks talk over, such as ib0; the one of the node's name when not given."""
    grace_seconds: float = setting(10.0, above=0.0)
    """How long the other ranks may take to end after one of them died; then they are killed."""
    wait: bool = True
    """Show rank 0's output and wait for the end; else return once the job is submitted (`dstune status`, `dstune cancel`)."""

    @property
    def ranks_per_node(self) -> int:
        return self.processes or self.gpus or 1

    @property
    def size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node
