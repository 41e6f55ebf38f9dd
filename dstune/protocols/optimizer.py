"""What an optimizer and a schedule of its learning rate are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class OptimizerConfig:
    """Base of every optimizer's configuration: fields of a subclass become keys `optimizer.FIELD`."""

    name: str = ""


@dataclass(frozen=True)
class ScheduleConfig:
    """Base of every schedule's configuration: fields of a subclass become keys `schedule.FIELD`."""

    name: str = ""


class Optimizer:
    """Base of every optimizer. Subclasses set `Config` and register with `@dstune.optimizer`."""

    Config: ClassVar[type] = OptimizerConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config


class Schedule:
    """Base of every schedule. Subclasses set `Config` and register with `@dstune.schedule`."""

    Config: ClassVar[type] = ScheduleConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config
