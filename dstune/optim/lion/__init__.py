"""optimizer=lion: updates by the sign of a momentum (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dstune.config.convert import format_value
from dstune.core.errors import Problem
from dstune.optim.adamw import betas_problem
from dstune.optim.lion.config import LionConfig
from dstune.protocols import Optimizer, optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@optimizer
class Lion(Optimizer):
    Config = LionConfig
    config: LionConfig
    decoupled_weight_decay = True
    rate_share = 0.1
    states_per_parameter = 1

    def check(self) -> Iterator[Problem]:
        yield from betas_problem(self.config.betas, "[0.9,0.99]")
        in_update, decay = self.config.betas
        if decay < in_update:
            reason = "the momentum would decay faster than the update expects"
            fix = "give a second number that is at least the first, for example [0.9,0.99]"
            yield Problem("optimizer.betas", reason, fix, format_value(self.config.betas))

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from dstune.optim.lion.step import LionStep

        return LionStep(groups, self.config)
