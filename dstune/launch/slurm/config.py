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
    """A SLURM job; its script is kept in the run directory."""

    name: str = "slurm"
    nodes: int = setting(1, at_least=1)
    """Nodes that train; `launch.spares` additional ones wait."""
    processes: int | None = setting(None, at_least=1)
    """Ranks on each node; by default one per GPU (`launch.gpus`), or 1 without GPUs."""
    gpus: int = setting(0, at_least=0)
    """GPUs on each node (`--gres=gpu:N`); 0 trains on CPUs."""
    cpus: int | None = setting(None, at_least=1)
    """CPU cores for each rank (`--cpus-per-task`)."""
    memory: str | None = None
    """Memory of each node (`--mem`), such as 64G; 0 requests all of it."""
    partition: str | None = None
    """Partition (`--partition`)."""
    account: str | None = None
    """Account that is charged (`--account`)."""
    qos: str | None = None
    """Quality of service (`--qos`)."""
    constraint: str | None = None
    """Features that the nodes need (`--constraint`)."""
    time: str | None = setting(None, example="1:30:00")
    """Time limit (`--time`), such as 30, 1:30:00 or 2-12; by default that of the partition."""
    signal_seconds: int = setting(120, at_least=1)
    """Seconds before the time limit at which the ranks are asked to save."""
    requeue: bool = True
    """Return a job that ran out of time to the queue, to continue there; if a node fails, SLURM requeues the job itself."""
    chain: int = setting(1, at_least=1)
    """Number of jobs to submit at once, each continuing after the previous one; for clusters that forbid requeueing."""
    container: str | None = setting(None, signed=True)
    """Container image that the ranks run in."""
    container_runtime: ContainerRuntime = ContainerRuntime.pyxis
    """`pyxis` (Enroot, through srun) or `apptainer`."""
    container_mounts: list[str] = setting([], signed=True, example="[FOLDER]", needs="launch.container=IMAGE")
    """Folders to mount in the container besides the run directory, as FOLDER or FOLDER:FOLDER_IN_CONTAINER."""
    container_python: str = setting("python3", signed=True)
    """Python interpreter inside the container that has dstune installed."""
    directives: list[str] = setting([], signed=True, example="[--exclusive]")
    """Additional options of sbatch, such as [--exclusive, --mail-type=END]."""
    setup: list[str] = setting([], signed=True)
    """Shell commands to run before the ranks start, such as [module load cuda]."""
    srun_options: list[str] = setting([], signed=True)
    """Additional options of srun, such as [--cpu-bind=cores]."""
    interface: str | None = None
    """Network interface that the ranks communicate over, such as ib0; by default the one that the node's name resolves to."""
    grace_seconds: float = setting(10.0, above=0.0)
    """Seconds that the other ranks get to end by themselves after one died; then they are killed."""
    wait: bool = True
    """Show rank 0's output and wait for the end. If `false`, return once the job is submitted (see `dstune status`, `dstune
    cancel`)."""

    @property
    def ranks_per_node(self) -> int:
        return self.processes or self.gpus or 1

    @property
    def size(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * self.ranks_per_node
