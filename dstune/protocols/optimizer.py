"""What an optimizer and a schedule of its learning rate are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.core.errors import Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OptimizerConfig:
    """Base of every optimizer's configuration: fields of a subclass become keys `optimizer.FIELD`."""

    name: str = ""
    lr: float = 0.0
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay; never applied to norms and biases."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Base of every schedule's configuration: fields of a subclass become keys `schedule.FIELD`."""

    name: str = ""


class Optimizer:
    """Base of every optimizer. Subclasses set `Config` and register with `@dstune.optimizer`."""

    Config: ClassVar[type] = OptimizerConfig
    name: ClassVar[str] = ""
    decoupled_weight_decay: ClassVar[bool] = False
    """Whether the decay shrinks the weights themselves (AdamW) instead of adding to the gradient (an L2 penalty)."""

    def __init__(self, config: Any):
        self.config = config

    def check(self) -> Iterator[Problem]:
        """What is wrong with the configuration beyond the range of each field."""
        yield from ()

    @property
    def states_per_parameter(self) -> int:
        """fp32 tensors of a parameter's size that are kept for it: memory, checkpoints and swap files depend on it."""
        raise NotImplementedError

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """A torch optimizer over `groups`, with `config.lr`. It must work element by element: DeepSpeed exchanges the
        parameters for this rank's partitions of them, which are flat.

        groups: `params`, `weight_decay` and `rate`, the factor on the learning rate.
        """
        raise NotImplementedError


class Schedule:
    """Base of every schedule. Subclasses set `Config` and register with `@dstune.schedule`."""

    Config: ClassVar[type] = ScheduleConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config

    def check(self, max_steps: int | None) -> Iterator[Problem]:
        """What is wrong with the configuration beyond the range of each field. max_steps: the run's, where it is given."""
        yield from ()

    def without_effect(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """(key, (reason, what would let it count)) of every field that another one overrules."""
        yield from ()

    def factor(self, step: int, total_steps: int) -> float:
        """Fraction of the peak rate for optimizer step `step` (0 is the first) of `total_steps`."""
        raise NotImplementedError
