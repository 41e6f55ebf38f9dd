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
    """How often mpirun is started again after a failure, on the same hosts; the same failure at the same step twice ends
    the run."""
    processes: int | None = setting(None, at_least=1)
    """Ranks on this machine; every GPU when not given, else two. With a hostfile its slots are the ranks."""
    hostfile: str | None = setting(None, signed=True)
    """File with one `HOST slots=N` a line; this machine alone when not given."""
    user: str | None = setting(None, signed=True)
    """Name to log in with."""
    interface: str | None = None
    """Network interface that mpirun and the ranks talk over, such as ib0."""
    mpirun: str = setting("mpirun", signed=True)
    """The program, where it is not the first of that name."""
    mpirun_options: list[str] = setting([], signed=True)
    """Further options of mpirun."""
    grace_seconds: float = setting(10.0, above=0.0)
    """How long the ranks may take to end after one of them died; then they are killed."""
