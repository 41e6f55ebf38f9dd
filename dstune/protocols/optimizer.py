"""Defines an optimizer, and a schedule of its learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.core.errors import Problem

if TYPE_CHECKING:
    import torch

    from dstune.config.schema import RunConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """Base of every optimizer's configuration: fields of a subclass become keys `optimizer.FIELD`."""

    name: str = ""
    lr: float = 0.0
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay; never applied to norms and biases."""
    vision_lr: float | None = field(default=None, metadata={"at_least": 0.0})
    """Peak learning rate of the vision tower and its projector, with `model.train_vision`; `lr` when not given."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Base of every schedule's configuration: fields of a subclass become keys `schedule.FIELD`."""

    name: str = ""


class Optimizer:
    """Base of every optimizer. Subclasses set `Config` and register with `@dstune.optimizer`."""

    Config: ClassVar[type] = OptimizerConfig
    name: ClassVar[str] = ""
    decoupled_weight_decay: ClassVar[bool] = False
    """Whether weight decay shrinks the weights directly (AdamW) instead of adding to the gradient (an L2 penalty)."""
    rate_share: ClassVar[float] = 1.0
    """The default of `optimizer.lr` as a share of the method's rate, which is meant for AdamW."""
    why_no_other_layout: ClassVar[str] = ""
    """Why a run cannot continue with another number of ranks or at another ZeRO stage; empty if it can."""

    def __init__(self, config: Any):
        self.config = config

    def check(self) -> Iterator[Problem]:
        """Yield what is wrong with the configuration beyond the range of each field."""
        yield from ()

    def check_run(self, run: RunConfig) -> Iterator[Problem]:
        """Yield the settings of the run that the optimizer cannot be combined with."""
        yield from ()

    def missing(self) -> Iterator[Problem]:
        """Yield a problem for each package that it needs and that is not installed."""
        yield from ()

    def kind(self, name: str, shape: Sequence[int], *, is_table: bool) -> str:
        """Return the kind of update for the parameter `name`, if the optimizer has several. Parameters of different kinds never
        share a group; a group stores its kind under `kind`.

        is_table: whether it is the weight of an embedding, of which rows are looked up.
        """
        return ""

    def state_bytes(self, kind: str) -> float:
        """Return the bytes of optimizer state per element of a parameter of this kind."""
        return 4.0 * self.states_per_parameter

    @property
    def states_per_parameter(self) -> int:
        """Number of fp32 tensors that the optimizer keeps per parameter, in the parameter's size: swap files and `state_bytes`
        depend on it."""
        raise NotImplementedError

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build a torch optimizer over `groups`, with `config.lr`. DeepSpeed replaces the parameters by this rank's flat partitions
        of them, so the optimizer must work elementwise or have `use_matrices` (`dstune.zero.matrices`).

        groups: dicts with `params`, `weight_decay`, `kind` and `rate`, the factor on the learning rate.
        """
        raise NotImplementedError


class Schedule:
    """Base of every schedule. Subclasses set `Config` and register with `@dstune.schedule`."""

    Config: ClassVar[type] = ScheduleConfig
    name: ClassVar[str] = ""

    def __init__(self, config: Any):
        self.config = config

    def check(self, max_steps: int | None) -> Iterator[Problem]:
        """Yield what is wrong with the configuration beyond the range of each field. max_steps: the run's, where it is given."""
        yield from ()

    def without_effect(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (key, (reason, fix)) for every field that another one makes ineffective."""
        yield from ()

    def factor(self, step: int, total_steps: int) -> float:
        """Return the fraction of the peak rate for optimizer step `step` (0 is the first) of `total_steps`."""
        raise NotImplementedError
