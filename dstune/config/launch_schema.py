"""The typed configuration of `launch`: where and how the ranks are started."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting


class ContainerRuntime(Enum):
    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass(frozen=True)
class LocalConfig:
    """Ranks on this machine, started and supervised by dstune itself."""

    name: str = "local"
    processes: int | None = setting(None, at_least=1)
    """Ranks; every GPU when not given, else two (one on a single core)."""
    export_env: list[str] = setting([])
    """Further environment variables that the ranks inherit, beside the built-in list."""
    restarts: int = setting(0, at_least=0)
    """How often a run that failed starts again from its newest whole checkpoint; the same failure at the same step twice
    ends it."""
    grace_seconds: float = setting(5.0, above=0.0, at_most=8.0)
    """How long the other ranks may take to end after one of them died; then they are killed."""


@dataclass(frozen=True)
class SlurmConfig:
    """A SLURM job, whose script is kept in the run directory."""

    name: str = "slurm"
    nodes: int = setting(1, at_least=1)
    """Nodes of the job."""
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
    container: str | None = None
    """Image in which the ranks run."""
    container_runtime: ContainerRuntime = ContainerRuntime.pyxis
    """`pyxis` (Enroot, through srun) or `apptainer`."""
    container_mounts: list[str] = setting([])
    """Folders that the container sees beside the run directory, as FOLDER or FOLDER:THERE."""
    container_python: str = "python3"
    """The interpreter inside the container that has dstune."""
    directives: list[str] = setting([])
    """Further options of sbatch, such as [--exclusive, --mail-type=END]."""
    setup: list[str] = setting([])
    """Shell lines before the ranks start, such as [module load cuda]."""
    srun_options: list[str] = setting([])
    """Further options of srun, such as [--cpu-bind=cores]."""
    interface: str | None = None
    """Network interface that the ranks talk over, such as ib0; the one of the node's name when not given."""
    export_env: list[str] = setting([])
    """Further environment variables that the ranks inherit, beside the built-in list."""
    wait: bool = True
    """Show rank 0's output and wait for the end; else return once the job is submitted (`dstune status`, `dstune cancel`)."""


@dataclass(frozen=True)
class HostfileConfig:
    """Ranks on the hosts of a file, started by DeepSpeed's launcher over pdsh and ssh."""

    name: str = "hostfile"
    hostfile: str | None = None
    """File with one `HOST slots=N` a line; a slot is a rank (and a GPU)."""
    include: str | None = None
    """Hosts or slots to use, as HOST@HOST:0,1; all when not given."""
    exclude: str | None = None
    """Hosts or slots to leave out, in the same form."""
    user: str | None = None
    """Name to log in with; the one of this machine, or of ssh's configuration, when not given."""
    port: int | None = setting(None, at_least=1, at_most=65535)
    """Port of sshd."""
    interface: str | None = None
    """Network interface that the ranks talk over, such as ib0; the one that leads to rank 0 when not given."""
    export_env: list[str] = setting([])
    """Further environment variables that the ranks inherit, beside the built-in list."""
    grace_seconds: float = setting(10.0, above=0.0)
    """How long the ranks of other hosts may take to end after one of them died; then they are killed."""


@dataclass(frozen=True)
class OpenMpiConfig:
    """Ranks started by Open MPI's mpirun, on this machine or on the hosts of a file."""

    name: str = "openmpi"
    processes: int | None = setting(None, at_least=1)
    """Ranks on this machine; every GPU when not given, else two. With a hostfile its slots are the ranks."""
    hostfile: str | None = None
    """File with one `HOST slots=N` a line; this machine alone when not given."""
    include: str | None = None
    """Hosts or slots to use, as HOST@HOST:0,1; all when not given."""
    exclude: str | None = None
    """Hosts or slots to leave out, in the same form."""
    user: str | None = None
    """Name to log in with."""
    port: int | None = setting(None, at_least=1, at_most=65535)
    """Port of sshd."""
    interface: str | None = None
    """Network interface that mpirun and the ranks talk over, such as ib0."""
    mpirun: str = "mpirun"
    """The program, where it is not the first of that name."""
    mpirun_options: list[str] = setting([])
    """Further options of mpirun."""
    export_env: list[str] = setting([])
    """Further environment variables that the ranks inherit, beside the built-in list."""
    grace_seconds: float = setting(10.0, above=0.0)
    """How long the ranks may take to end after one of them died; then they are killed."""


LaunchConfig = LocalConfig | SlurmConfig | HostfileConfig | OpenMpiConfig

LAUNCHES: dict[str, type] = {
    "local": LocalConfig,
    "hostfile": HostfileConfig,
    "openmpi": OpenMpiConfig,
    "slurm": SlurmConfig,
}
"""Classes of the group by the name of the choice."""
