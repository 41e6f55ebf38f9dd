"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): a few ranks share the weights of each layer and see the same rows.

A rank has some attention heads and a part of each feed-forward layer's inner width: rows of the matrices that lead there, columns
of the matrix that leads back. Its output is one part of a sum, which the ranks add up in the forward pass; in the backward pass
they add up the gradients of a block's input. That makes two sums a layer in each pass. Every rank has complete embeddings, norms
and vocabulary projection, and computes the same values with them, including updated weights.

DeepSpeed has special layers for this (AutoTP). Here they are torch's linear layers with smaller matrices, so that names in
checkpoints, adapters and everything else that dstune does to layers stay the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import PreTrainedModel

from dstune.config.parallel_rules import INWARD, OUTWARD, slices_problems
from dstune.core.errors import Problem, UserError
from dstune.zero.slices import Slices

OF_HEADS = ("q_norm", "k_norm")
"""Norms that are complete on every rank and applied to each head: a rank's gradient covers only its heads."""


def slice_model(module: nn.Module, model: PreTrainedModel, slices: Slices) -> None:
    """Replace the weights of `module`'s layers by this rank's slices, and let the layers sum their outputs over the ranks.

    module: `model`, or `model` with adapters, complete and with the same weights on every rank. Call it before the optimizer and
    DeepSpeed get the parameters. Raises UserError for a model that cannot be sliced.
    """
    if problems := slices_problems(model.config.get_text_config().to_dict(), slices.parts):
        raise UserError(problems)
    block_count = 0
    for name, block in list(module.named_modules()):
        for inward, outward in zip(INWARD, OUTWARD, strict=True):
            if all(isinstance(getattr(block, part, None), nn.Module) for part in (*inward, outward)):
                _slice_block(name, block, inward, outward, slices)
                block_count += 1
    layers = model.config.get_text_config().num_hidden_layers
    assert block_count == 2 * layers, f"{block_count} blocks in {layers} layers"


def _slice_block(name: str, block: nn.Module, inward: tuple[str, ...], outward: str, slices: Slices) -> None:
    for part in (*inward, outward):
        projection = block.get_submodule(part)
        cut = _inward if part in inward else _outward
        for parameter_name, parameter in projection.named_parameters():
            cut(f"{name}.{part}.{parameter_name}", parameter_name, parameter, slices)
        for linear in (each for each in projection.modules() if isinstance(each, nn.Linear)):
            linear.out_features, linear.in_features = linear.weight.shape
            if part == outward and linear.bias is not None:
                linear.forward = partial(_without_bias, linear)  # type: ignore[method-assign]
    for norm in (getattr(block, part, None) for part in OF_HEADS):
        for parameter in norm.parameters() if isinstance(norm, nn.Module) else ():
            _sum_gradient(parameter, slices)
    block.register_forward_pre_hook(partial(_enter, slices), with_kwargs=True)
    leaving = block.get_submodule(outward)
    bias = getattr(getattr(leaving, "base_layer", leaving), "bias", None)
    leaving.register_forward_hook(partial(_leave, slices, bias))


def _inward(name: str, kind: str, parameter: nn.Parameter, slices: Slices) -> None:
    """Slice the rows of a matrix [inner width, width]. An adapter's first matrix [rank, width] stays complete, and its gradient is
    summed over the ranks."""
    if ".lora_A." in f".{kind}":
        _sum_gradient(parameter, slices)
    else:
        slices.cut(name, _sliceable(name, kind, parameter), 0)


def _outward(name: str, kind: str, parameter: nn.Parameter, slices: Slices) -> None:
    """Slice the columns of a matrix [width, inner width]. An adapter's second matrix [width, rank] stays complete, and its gradient
    is summed over the ranks. A bias stays complete too, and is added after the sum."""
    if ".lora_B." in f".{kind}":
        _sum_gradient(parameter, slices)
    elif not kind.endswith("bias"):
        slices.cut(name, _sliceable(name, kind, parameter), 1)


def _sliceable(name: str, kind: str, parameter: nn.Parameter) -> nn.Parameter:
    """Return `parameter`. Raises UserError unless it is a weight, a bias or part of a LoRA adapter. kind: its name within its
    layer."""
    names = ("weight", "bias", "base_layer.weight", "base_layer.bias")
    if kind not in names and ".lora_" not in f".{kind}":
        reason = f"it is not known how ranks share {name}"
        raise UserError(Problem("parallel", reason, "parallel=none, or method=full|lora", "tensor"))
    return parameter


def _sum_gradient(parameter: nn.Parameter, slices: Slices) -> None:
    if parameter.requires_grad:
        parameter.register_hook(slices.sum)


def _without_bias(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return functional.linear(hidden, linear.weight)


def _enter(
    slices: Slices, block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Make the backward pass sum the gradient of a block's input over the ranks."""
    if "hidden_states" in keywords:
        return arguments, keywords | {"hidden_states": _Enter.apply(keywords["hidden_states"], slices)}
    hidden, *other_arguments = arguments
    return (_Enter.apply(hidden, slices), *other_arguments), keywords


def _leave(
    slices: Slices, bias: torch.Tensor | None, projection: nn.Module, arguments: Any, output: torch.Tensor
) -> torch.Tensor:
    total: torch.Tensor = _Leave.apply(output, slices)
    return total if bias is None else total + bias


class _Enter(torch.autograd.Function):
    """Returns its input in the forward pass, and the sum of the ranks' gradients in the backward pass."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, slices: Slices) -> torch.Tensor:
        context.slices = slices
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return context.slices.sum(gradient), None


class _Leave(torch.autograd.Function):
    """Returns the sum of the ranks' parts in the forward pass, and passes the gradient on unchanged in the backward pass."""

    @staticmethod
    def forward(context: Any, part: torch.Tensor, slices: Slices) -> torch.Tensor:
        return slices.sum(part)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return gradient, None
