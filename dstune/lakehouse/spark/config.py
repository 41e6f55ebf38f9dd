"""Keys of launch=spark."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from dstune.config.fields import setting
from dstune.protocols.launcher import LaunchConfig


@dataclass(frozen=True)
class SparkConfig(LaunchConfig):
    """Ranks in the tasks of a barrier stage of Apache Spark."""

    absent_keys = MappingProxyType(
        dict.fromkeys(
            ("restarts", "min_nodes", "spares"),
            "Spark itself starts the ranks again where it loses a task (spark.stage.maxConsecutiveAttempts), on as many as before",
        )
    )
    name: str = "spark"
    processes: int | None = setting(None, at_least=1)
    """Number of ranks, each a Spark task; as many as Spark runs at once when not given."""
    master: str | None = setting(None, signed=True)
    """`local[N]`, `spark://HOST:PORT`, ...; the active session's, else spark-submit's, else this machine when not given."""
    interface: str | None = None
    """Network interface that the ranks communicate over, such as ib0; by default the one that leads to rank 0."""
    grace_seconds: float = setting(10.0, above=0.0, at_most=20.0)
    """Seconds that the other ranks get to end by themselves after one died; then they are killed."""
