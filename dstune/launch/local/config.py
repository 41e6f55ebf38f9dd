"""Keys of launch=local."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from dstune.config.fields import setting
from dstune.protocols.launcher import LaunchConfig


@dataclass(frozen=True)
class LocalConfig(LaunchConfig):
    """Ranks on this machine, started and supervised by dstune itself."""

    absent_keys = MappingProxyType(dict.fromkeys(("min_nodes", "spares"), "all its ranks are on this machine"))
    name: str = "local"
    processes: int | None = setting(None, at_least=1)
    """Number of ranks; by default one per GPU, or two without GPUs (one on a single core)."""
    restarts: int = setting(0, at_least=0)
    """How often a failed run is restarted from its newest complete checkpoint; the same failure at the same step twice ends
    the run."""
    grace_seconds: float = setting(5.0, above=0.0, at_most=8.0)
    """Seconds that the other ranks get to end by themselves after one died; then they are killed."""
    warm: bool = True
    """If ranks may start more than once (`launch.restarts`, a sweep, jobs of the fine-tuning API), fork them from a process that
    has already done their imports; `false` starts each rank as a new process."""
    in_process: bool = False
    """Run the rank in the process that you started, so that breakpoints work. Needs `launch.processes=1`."""
