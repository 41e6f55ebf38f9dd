"""Keys of the launchers that start ranks on the hosts of a file."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.launcher import LaunchConfig


@dataclass(frozen=True)
class OnHostsConfig(LaunchConfig):
    hostfile: str | None = setting(None, signed=True)
    """File with one `HOST slots=N` per line; each slot is one rank (and one GPU)."""
    include: str | None = None
    """Hosts or slots to use, as HOST@HOST:0,1 (openmpi: only the first slots of a host); all by default."""
    exclude: str | None = None
    """Hosts or slots to leave out, in the same form."""
    user: str | None = setting(None, signed=True)
    """User name to log in with; by default the one that ssh's configuration gives, or yours on this machine."""
    port: int | None = setting(None, at_least=1, at_most=65535, signed=True)
    """Port of sshd."""
    interface: str | None = None
    """Network interface that the ranks communicate over, such as ib0; by default the one that leads to rank 0."""
    grace_seconds: float = setting(10.0, above=0.0)
    """Seconds that the other ranks get to end by themselves after one died; then they are killed."""
