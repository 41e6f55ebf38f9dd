"""Transforms logits as a model does after its vocabulary projection: Gemma caps them, Cohere and Granite scale them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CAPS = ("final_logit_softcapping",)
"""Settings of transformers whose value is a cap."""
SCALES = ("logit_scale", "logits_scaling")
"""Settings by which a model multiplies or divides its logits. Only a probe can tell which."""


@dataclass(frozen=True)
class LogitTransform:
    """`cap * tanh(scale * logits / cap)`, or `scale * logits` without a cap."""

    scale: float = 1.0
    cap: float | None = None
    switches: tuple[tuple[Any, str, Any], ...] = ()
    """(object, attribute, value without effect) of each setting that the model reads."""

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def before(self, gradient: Tensor, transformed: Tensor) -> Tensor:
        """Return the gradient with respect to the input. gradient: with respect to the output, which is `transformed`."""
        if self.cap is not None:
            gradient = gradient * (1 - (transformed / self.cap).square())
        return gradient * self.scale if self.scale != 1.0 else gradient

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Let the model return untransformed logits within the block."""
        values = [(owner, name, getattr(owner, name)) for owner, name, _ in self.switches]
        for owner, name, neutral in self.switches:
            setattr(owner, name, neutral)
        try:
            yield
        finally:
            for owner, name, value in values:
                setattr(owner, name, value)


def possible_transforms(model: Any) -> list[LogitTransform]:
    """Return the transforms that the settings of `model` may mean; only a probe can tell which one is right."""
    config = model.config
    text = config.get_text_config(decoder=True)
    owners = [model, config] if text is config else [model, config, text]
    caps = [(owner, name) for owner in owners for name in CAPS if _is_number(getattr(owner, name, None))]
    scales = [(owner, name) for owner in owners for name in SCALES if _is_number(getattr(owner, name, None))]
    switches = tuple((owner, name, None) for owner, name in caps) + tuple((owner, name, 1.0) for owner, name in scales)
    cap = next((float(getattr(owner, name)) for owner, name in caps), None)
    factors = [1.0]
    if scales:
        owner, name = scales[0]
        factors = [float(getattr(owner, name)), 1 / float(getattr(owner, name))]
    return [LogitTransform(factor, cap, switches) for factor in factors]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0
