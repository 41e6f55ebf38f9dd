"""parallel=none."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.protocols import Parallelism, parallelism
from dstune.protocols.parallelism import ParallelConfig


@dataclass(frozen=True)
class NoParallelConfig(ParallelConfig):
    """Every rank computes rows of its own."""

    name: str = "none"


@parallelism
class NoParallelism(Parallelism):
    Config = NoParallelConfig
    config: NoParallelConfig
