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
    """Ranks; every GPU when not given, else two (one on a single core)."""
    restarts: int = setting(0, at_least=0)
    """How often a run that failed starts again from its newest whole checkpoint; the same failure at the same step twice
    ends it."""
    grace_seconds: float = setting(5.0, above=0.0, at_most=8.0)
    """How long the other ranks may take to end after one of them died; then they are killed."""
    warm: bool = True
    """Where a run may start more than once (`launch.restarts`, a sweep, jobs of the fine-tuning API), fork its ranks from a process
    that has done their imports; `false` starts each rank anew."""
    in_process: bool = False
    """Run the rank in the process that was started, so that breakpoints work: with `launch.processes=1` only."""
