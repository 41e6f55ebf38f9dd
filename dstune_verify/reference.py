"""The plain torch loop that everything is compared with, the comparison, and its bounds.

A gradient is measured from outside: SGD without momentum changes a weight by learning rate times (clipped) gradient, so
(weights before - weights after) / learning rate is the gradient that the engine applied, whatever it is made of. Before each step
the plain loop takes over the engine's weights (teacher forcing), so that rounding does not accumulate over steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dstune_verify.models import Batch

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Bounds:
    """The largest errors that are still called right.

    What rounding the weights after the step can add is subtracted from an error first: about 0.008 of a gradient in bf16. The
    smallest known fault has an error of 0.13.
    """

    loss: float
    """Relative error of a micro-batch's loss."""
    gradient: float
    """Norm of the gradient's error, relative to the norm of the gradient."""
    tensor: float
    """The same for the worst tensor, among those whose gradient is at least a thousandth of the whole."""
    scale: float
    """|projection on the expected gradient - 1|: a constant factor."""

    def raised_to(self, noise: float) -> Bounds:
        """Return the bounds for a model whose half-precision gradient is `noise` away from the exact one, up to MOST_NOISE."""
        gradient = max(self.gradient, min(noise, MOST_NOISE))
        return Bounds(self.loss, gradient, max(self.tensor, 4 * gradient), max(self.scale, gradient / 2))


MOST_NOISE = 0.1
"""The smallest known fault has an error of 0.13."""
BOUNDS = {
    "fp32": Bounds(loss=1e-5, gradient=1e-4, tensor=1e-4, scale=1e-4),
    "bf16": Bounds(loss=1e-2, gradient=0.02, tensor=0.08, scale=0.01),
    "fp16": Bounds(loss=1e-2, gradient=0.02, tensor=0.08, scale=0.01),
}
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
SMALL = 1e-3
"""Tensors with a smaller share of the gradient's norm are not judged alone: they are rounding."""


@dataclass(frozen=True)
class Errors:
    """How far a step was from the plain loop's. All figures are relative."""

    loss: float
    gradient: float
    tensor: float
    """The worst tensor's error, less what rounding its weights can add."""
    tensor_name: str
    scale: float
    norm_ratio: float
    """Norm of the measured gradient, divided by that of the expected one."""
    rounding: float
    """What rounding the weights to their type can add to `gradient`; the bounds are raised by it."""
    frozen_moved: str = ""
    """A frozen weight that changed."""

    def exceeds(self, bounds: Bounds) -> str:
        """Return which figure is above its bound, in words; an empty text if none is. NaN is above every bound."""
        if self.frozen_moved:
            return f"frozen weight {self.frozen_moved} changed"
        allowances = {
            "gradient": self.gradient - self.rounding,
            "tensor": self.tensor,
            "scale": self.scale - self.rounding,
            "loss": self.loss,
        }
        for name, value in allowances.items():
            bound = getattr(bounds, name)
            if not value <= bound:
                where = f" of {self.tensor_name}" if name == "tensor" else ""
                return f"error of {name}{where} is {getattr(self, name):.3g}, bound {bound:.3g}"
        return ""


def plain_gradients(
    model: nn.Module, weights: Weights, batches: Sequence[Sequence[Batch]], clipping: float
) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Return the losses, `[rank][micro-batch]`, and the clipped gradients in float32 by name.

    The gradient is the mean over all micro-batches of all ranks. Each micro-batch is computed in the type of `model`, the sum in
    float32. clipping: the largest norm, 0 for none.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in trained.items()}
    losses: list[list[float]] = []
    for of_rank in batches:
        losses.append([])
        for batch in of_rank:
            model.zero_grad(set_to_none=True)
            loss = model(batch)
            loss.backward()
            losses[-1].append(float(loss))
            for name, parameter in trained.items():
                if parameter.grad is not None:
                    total[name] += parameter.grad.float()
    model.zero_grad(set_to_none=True)
    count = sum(map(len, batches))
    gradients = {name: gradient / count for name, gradient in total.items()}
    if clipping:
        factor = min(1.0, clipping / (norm(gradients) + 1e-6))
        gradients = {name: gradient * factor for name, gradient in gradients.items()}
    return losses, gradients


def norm(tensors: Weights) -> float:
    """Return the Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def distance(gradients: Weights, exact: Weights) -> float:
    """Return the norm of the difference, relative to the norm of `exact`."""
    difference = {name: gradients[name].double() - exact[name].double() for name in exact}
    return norm(difference) / (norm(exact) or 1e-30)


def worst_tensor(
    difference: Weights, expected: Weights, rounding: Mapping[str, float] | None = None
) -> tuple[float, str]:
    """Return the largest relative error among the tensors that have at least SMALL of the norm of all, and its tensor's name.

    rounding: what is subtracted from the norm of each difference.
    """
    worst, worst_name, size = 0.0, "", norm(expected) or 1e-30
    for name, tensor in expected.items():
        of_tensor = float(tensor.double().norm())
        if of_tensor >= SMALL * size:
            error = (float(difference[name].double().norm()) - (rounding or {}).get(name, 0.0)) / of_tensor
            if not error <= worst:  # also for NaN
                worst, worst_name = error, name
    return worst, worst_name


def learning_rate(weights: Weights, gradients: Weights) -> float:
    """Return a power of two that makes the first step half as long as the weights: weights are rounded to their type after a
    step, which hides small steps."""
    trained = {name: weights[name] for name in gradients}
    return 2.0 ** round(math.log2(0.5 * norm(trained) / max(norm(gradients), 1e-12)))


def compare(
    before: Weights,
    after: Weights,
    gradients: Weights,
    losses: Sequence[float],
    expected_losses: Sequence[float],
    rate: float,
    dtype: torch.dtype,
) -> Errors:
    """Compare a step of an engine with the plain loop's gradients. dtype: the type in which the engine holds weights."""
    measured = {name: (before[name].double() - after[name].double()) / rate for name in gradients}
    expected = {name: gradient.double() for name, gradient in gradients.items()}
    difference = {name: measured[name] - expected[name] for name in expected}
    size = norm(expected) or 1e-30
    largest = {name: torch.maximum(before[name].abs(), after[name].abs()).double() for name in expected}
    rounding = {name: 2 * UNIT_ROUNDOFF[dtype] * float(largest[name].norm()) / rate for name in expected}
    worst, worst_name = worst_tensor(difference, expected, rounding)
    product = sum(float((measured[name] * expected[name]).sum()) for name in expected)
    frozen = (name for name in before if name not in expected and not torch.equal(before[name], after[name]))
    return Errors(
        loss=max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(losses, expected_losses, strict=True)),
        gradient=norm(difference) / size,
        tensor=worst,
        tensor_name=worst_name,
        scale=abs(product / size**2 - 1),
        norm_ratio=norm(measured) / size,
        rounding=math.hypot(*rounding.values()) / size,
        frozen_moved=next(frozen, ""),
    )
