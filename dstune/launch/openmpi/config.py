"""Keys of launch=openmpi."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from dstune.config.fields import setting
from dstune.launch.on_hosts_config import OnHostsConfig


@dataclass(frozen=True)
class OpenMpiConfig(OnHostsConfig):
    """Ranks started by Open MPI's mpirun, on this machine or on the hosts of a file."""

    absent_keys = MappingProxyType(
        dict.fromkeys(("min_nodes", "spares"), "mpirun ends with the first host that it loses")
    )
    name: str = "openmpi"
    restarts: int = setting(0, at_least=0)
    """How often mpirun is restarted after a failure, on the same hosts; the same failure at the same step twice ends the run."""
    processes: int | None = setting(None, at_least=1)
    """Number of ranks on this machine; by default one per GPU, or two without GPUs. A hostfile's slots replace this."""
    hostfile: str | None = setting(None, signed=True)
    """File with one `HOST slots=N` per line; by default all ranks run on this machine."""
    user: str | None = setting(None, signed=True)
    """User name to log in with."""
    interface: str | None = None
    """Network interface that mpirun and the ranks communicate over, such as ib0."""
    mpirun: str = setting("mpirun", signed=True)
    """Path of mpirun, if it is not the first program of that name on PATH."""
    mpirun_options: list[str] = setting([], signed=True)
    """Additional options of mpirun."""
    grace_seconds: float = setting(10.0, above=0.0)
    """Seconds that the other ranks get to end by themselves after one died; then they are killed."""
