"""AdamW for the groups of an optimizer that has another update for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def fused_adamw(group: dict[str, Any], parameters: Sequence[Tensor], states: Any) -> None:
    """Update `parameters`, which have gradients, as `torch.optim.AdamW(fused=True)` would.

    group: `lr`, `weight_decay`, `betas`, `eps`. states: what the optimizer keeps, by parameter.
    """
    import torch
    from torch.optim.adamw import adamw

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
