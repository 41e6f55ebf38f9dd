"""Base of optimizers with a special update for parameter groups of one kind and AdamW's update for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class BesideAdamW(torch.optim.Optimizer):
    """Updates groups of `kind` parameter by parameter with `update`, and groups of other kinds with AdamW."""

    kind: ClassVar[str]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["kind"] != self.kind:
                fused_adamw(group, parameters, self.state)
                continue
            for parameter in parameters:
                self.update(group, parameter, parameter.grad)

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        """Update one parameter, or this rank's part of it, in a group of `kind`. gradient: in the same shape."""
        raise NotImplementedError


def fused_adamw(group: dict[str, Any], parameters: Sequence[Tensor], states: Any) -> None:
    """Update `parameters`, which have gradients, as `torch.optim.AdamW(fused=True)` would.

    group: with `lr`, `weight_decay`, `betas` and `eps`. states: the optimizer's states by parameter.
    """
    for parameter in parameters:
        if "step" not in states[parameter]:
            states[parameter]["step"] = torch.zeros((), device=parameter.device)
            for moment in ("exp_avg", "exp_avg_sq"):
                states[parameter][moment] = torch.zeros_like(parameter)
    if not parameters:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    averages, squares, steps = (
        [states[parameter][key] for parameter in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
    )
    adamw(
        list(parameters),
        gradients,
        averages,
        squares,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
