"""Switches the peft adapters of a model off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch off the adapters and the dropout of `model` within the block.

    Sets only the flags of peft's layers. peft's own `disable_adapter` also changes `requires_grad` of the trained parameters, which
    must not happen during a step.
    """
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    assert adapted, "there is no adapter to switch off"
    training = model.training
    model.eval()
    for module in adapted:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in adapted:
            module._disable_adapters = False
        model.train(training)
