"""What a task is: the rows it reads, the model and loss it trains, how it is measured, predicted and exported.

Everything is a function of the task's own configuration (`self.config`), since a regression, a tag scheme or a loss changes
the answer. Methods get the whole `RunConfig` where other sections matter. Only what a room keeps in its own `encode`, `head`,
`metrics` and `predict` modules may import torch: import them inside the methods below, so that the launcher stays light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class TaskConfig:
    """Base of every task's configuration: fields of a subclass become keys `task.FIELD`."""

    name: str = ""


class Task:
    """Base of every task. Subclasses set `Config` and register with `@dstune.task`."""

    Config: ClassVar[type] = TaskConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config
