"""Adapters of peft below a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch off the adapters of `model`, and dropout, within the block.

    The flags of peft's layers alone are set: its own `disable_adapter` sets `requires_grad` of what is trained as well,
    which the optimizer of a running step must not see.
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
