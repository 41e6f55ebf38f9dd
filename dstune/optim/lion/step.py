"""Lion as a torch optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dstune.optim.lion.config import LionConfig


class LionStep(torch.optim.Optimizer):
    """Updates element by element, so that a partition of a parameter changes as in an update of the complete one."""

    def __init__(self, groups: list[dict[str, Any]], config: LionConfig):
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay, "betas": config.betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            in_update, decay = group["betas"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                momentum = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(momentum.lerp(gradient, 1 - in_update).sign_(), alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - decay)
