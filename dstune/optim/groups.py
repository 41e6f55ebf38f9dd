"""Parameter groups of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dstune.protocols import method_of

if TYPE_CHECKING:
    from torch import nn

    from dstune.config.schema import RunConfig


def method_groups(config: RunConfig, module: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's parameter groups for `module`, as `config.method` has trained it."""
    method = method_of(config.method)
    return parameter_groups(module, config.optimizer.weight_decay, method.rates(module), method.parts(module))


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    rate_of: Callable[[str], float] = lambda name: 1.0,
    part_of: Callable[[str], int] = lambda name: 0,
) -> list[dict[str, Any]]:
    """Trained parameters in groups: by their factor on the learning rate, and with weight decay or (norms, biases, other
    vectors) without.

    rate_of: the factor for the parameter of this name. It stays in the group as `rate`, which
    `Engine.set_learning_rate` multiplies. part_of: parameters of different parts are never in one group.

    A parameter frozen here never enters the optimizer; an empty group would crash DeepSpeed's stages 1 and 2.
    """
    from dstune.zero.parts import full_shape  # torch: the registry imports this file with the optimizers beside it

    members: dict[tuple[int, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = len(full_shape(parameter)) >= 2
            members.setdefault((part_of(name), rate_of(name), decayed), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "rate": rate}
        for (_, rate, decayed), parameters in sorted(members.items(), key=lambda item: (*item[0][:2], not item[0][2]))
    ]
