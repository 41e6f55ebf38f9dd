"""Keys of the launchers that start ranks on the hosts of a file."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.launcher import LaunchConfig


@dataclass(frozen=True)
class OnHostsConfig(LaunchConfig):
    hostfile: str | None = setting(None, signed=True)
    """File with one `HOST slots=N` a line; a slot is a rank (and a GPU)."""
    include: str | None = None
    """Hosts or slots to use, as HOST@HOST:0,1 (openmpi: a host's first slots only); all when not given."""
    exclude: str | None = None
    """Hosts or slots to leave out, in the same form."""
    user: str | None = setting(None, signed=True)
    """Name to log in with; the one of this machine, or of ssh's configuration, when not given."""
    port: int | None = setting(None, at_least=1, at_most=65535, signed=True)
    """Port of sshd."""
    interface: str | None = None
    """Network interface that the ranks talk over, such as ib0; the one that leads to rank 0 when not given."""
    grace_seconds: float = setting(10.0, above=0.0)
    """How long the ranks of other hosts may take to end after one of them died; then they are killed."""
