"""Builds the parameter groups of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from dstune.protocols import method_of, optimizer_of
from dstune.protocols.method_options import UnfreezesLater

if TYPE_CHECKING:
    from torch import nn

    from dstune.config.schema import RunConfig


def method_groups(config: RunConfig, module: nn.Module, vision_parts: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups for `module`, in which `config.method` has frozen what it does not train.

    vision_parts: names of the modules to which `optimizer.vision_lr` applies, in the model without adapters.
    """
    method, optimizer = method_of(config.method), optimizer_of(config.optimizer)
    decay, rates = config.optimizer.weight_decay, method.rates(module)
    part_of = method.parts(module) if isinstance(method, UnfreezesLater) else lambda name: 0

    def rate_of(name: str) -> float:
        is_vision = any(f".{part}." in f".{name}." for part in vision_parts)
        return rates(name) * (vision_share(config) if is_vision else 1.0)

    return parameter_groups(module, decay, rate_of, part_of, optimizer.kind)


def vision_share(config: RunConfig) -> float:
    """Return the learning rate of a vision tower as a factor on `optimizer.lr`."""
    rate = config.optimizer.vision_lr
    return 1.0 if rate is None or not config.optimizer.lr else rate / config.optimizer.lr


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    rate_of: Callable[[str], float] = lambda name: 1.0,
    part_of: Callable[[str], int] = lambda name: 0,
    kind_of: Callable[..., str] = lambda name, shape, *, is_table: "",
) -> list[dict[str, Any]]:
    """Group trained parameters by their part, their factor on the learning rate, their kind, and whether they have weight decay
    (norms, biases and other vectors have none).

    rate_of: the factor for the parameter with this name. The group keeps it as `rate`, which `Engine.set_learning_rate`
    multiplies. part_of: the part of the parameter with this name; different parts never share a group. kind_of:
    `Optimizer.kind`.

    A parameter that is frozen now never enters the optimizer; an empty group would crash DeepSpeed at stages 1 and 2.
    """
    from torch import nn  # not at the top: the registry imports this file together with the optimizers

    from dstune.zero.parts import full_shape

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    members: dict[tuple[int, float, bool, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = full_shape(parameter)
            kind = kind_of(name, shape, is_table=id(parameter) in tables)
            members.setdefault((part_of(name), rate_of(name), len(shape) < 2, kind), []).append(parameter)
    return [
        {"params": members[key], "weight_decay": 0.0 if is_vector else weight_decay, "rate": rate, "kind": kind}
        for key in sorted(members)
        for _, rate, is_vector, kind in [key]
    ]
