"""optimizer=signum: sign momentum (Bernstein et al. 2018, arXiv:1802.04434), with a share of the gradient in the update.

dstune train plugins=[examples/plugins/signum.py] optimizer=signum optimizer.lr=1e-5 ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import dstune
from dstune.config.fields import setting
from dstune.protocols.optimizer import OptimizerConfig


@dataclass(frozen=True)
class SignumConfig(OptimizerConfig):
    """Updates by the sign of an interpolated momentum: one state a parameter, where AdamW has two."""

    name: str = "signum"
    lr: float = setting(1e-5, at_least=0.0)
    """Peak learning rate; a third to a tenth of AdamW's."""
    weight_decay: float = setting(0.1, at_least=0.0)
    """Weight decay; never applied to norms and biases."""
    update_momentum: float = setting(0.9, at_least=0.0, below=1.0)
    """Share of the momentum in the update (beta 1 of the paper)."""
    momentum: float = setting(0.99, at_least=0.0, below=1.0)
    """Decay rate of the momentum (beta 2)."""


@dstune.optimizer
class Signum(dstune.Optimizer):
    Config = SignumConfig
    config: SignumConfig
    decoupled_weight_decay = True
    states_per_parameter = 1

    def check(self) -> Iterator[dstune.Problem]:
        if self.config.momentum < self.config.update_momentum:
            reason = "the momentum would forget faster than the update that reads it"
            yield dstune.Problem("optimizer.momentum", reason, f"at least {self.config.update_momentum}")

    def build(self, groups: list[dict[str, Any]]) -> Any:
        import torch

        class SignumStep(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: Any = None) -> None:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is None:
                            continue
                        state = self.state[parameter]
                        if "exp_avg" not in state:
                            state["exp_avg"] = torch.zeros_like(parameter)
                        momentum, gradient = state["exp_avg"], parameter.grad
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                        update = momentum.lerp(gradient, 1 - group["update_momentum"]).sign_()
                        parameter.add_(update, alpha=-group["lr"])
                        momentum.lerp_(gradient, 1 - group["momentum"])

        config = self.config
        defaults = {"lr": config.lr, "weight_decay": config.weight_decay}
        defaults |= {"update_momentum": config.update_momentum, "momentum": config.momentum}
        return SignumStep(groups, defaults)
