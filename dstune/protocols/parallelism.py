"""What a way to share one row or one layer between ranks is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class ParallelConfig:
    """Base of every parallelism's configuration: fields of a subclass become keys `parallel.FIELD`."""

    name: str = ""


class Parallelism:
    """Base of every parallelism. Subclasses set `Config` and register with `@dstune.parallelism`."""

    Config: ClassVar[type] = ParallelConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config
