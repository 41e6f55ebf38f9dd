"""Fuses vocabulary projection and cross entropy, a chunk of targets at a time: all logits of a batch never exist at once.

At 4,096 targets and 151,936 tokens the usual way holds 2.5 GB of fp32 logits three times (logits, log-softmax, gradient);
here only one chunk exists, in the model's own format. The gradient of a sum of cross entropies is known in the forward pass
(softmax minus one at the target), so a plain linear projection needs no second multiplication in the backward pass: the
gradients of hidden states and weight are computed chunk by chunk and only scaled later (Hsu et al. 2024, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.checkpoint import checkpoint

from dstune.zero.parts import full_shape, is_partitioned

CHUNK_BYTES = 2**27
"""Bytes of logits in memory at a time. Every further chunk has to be added to the weight's gradient: 1,024 targets of SmolLM2
took 1.07 s on one core as one chunk, 1.40 s as two, and 1.53 s the usual way."""
ACCELERATOR_CHUNK_BYTES = 2**29
"""The same on an accelerator, with logits in fp32: a product of few rows would leave it idle. Calculated, not measured."""
TILE_ROWS = 256
"""On an accelerator, the rows of a chunk are a multiple of this: the largest block of rows in a matrix product."""
BLOCK_ELEMENTS = {"cpu": 2**18}
"""Logits that are converted to fp32 probabilities at a time: a CPU keeps them in its cache."""
SCALED_ROWS = 4096
"""Rows of the weight's gradient that are converted at a time."""

Project = Callable[[torch.Tensor], torch.Tensor]


class CrossEntropy(NamedTuple):
    loss_sum: torch.Tensor
    """Sum over the targets, scalar fp32 with a graph."""
    correct: torch.Tensor
    """How many targets have the largest logit, scalar; 0 while gradients are enabled, since only evaluation needs it."""


def projected_cross_entropy(
    projection: nn.Module, project: Project, hidden: torch.Tensor, targets: torch.Tensor
) -> CrossEntropy:
    """Compute the cross entropy of `project(hidden)`. Call it inside the forward pass of `projection`.

    projection: the module whose forward is `project`. A linear layer without bias computes its gradients in the forward pass
    (except in fp16); any other module (an adapter on the projection, trained token rows) computes the logits of a chunk again
    in the backward pass.
    hidden: [targets, hidden size]; targets: [targets], none of them ignored.
    """
    rows = rows_at_once(projection, hidden) or max(1, len(hidden))
    loss_sum = hidden.new_zeros((), dtype=torch.float32)
    correct = torch.zeros((), dtype=torch.long, device=hidden.device)
    if torch.is_grad_enabled() and is_multiplied_once(projection, hidden.dtype):
        return CrossEntropy(LinearLoss.apply(hidden, projection.weight, BlockCrossEntropy(targets), rows), correct)
    # Without targets this is one chunk of no rows, which gives all weights a gradient of zeros.
    for chunk, expected in zip(hidden.split(rows), targets.split(rows), strict=True):
        if torch.is_grad_enabled():
            loss_sum = loss_sum + checkpoint(_loss_sum, project, chunk, expected, use_reentrant=False)
        else:
            loss, hits = _loss_and_hits(project(chunk), expected)
            loss_sum, correct = loss_sum + loss, correct + hits
    return CrossEntropy(loss_sum, correct)


def projected_log_probabilities(
    projection: nn.Module, project: Project, hidden: torch.Tensor, targets: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """Compute log-probabilities of `targets` under softmax(`project(hidden)` / temperature), fp32 [targets]. Call it inside the
    forward pass of `projection`.

    If there are several chunks, their logits are computed again in the backward pass. hidden: [targets, hidden size]; targets:
    [targets].
    """
    rows = rows_at_once(projection, hidden) or max(1, len(hidden))
    # Recomputing one chunk would save nothing: the backward pass starts here and would hold the same logits.
    if len(hidden) <= rows:
        return _log_probabilities(project, hidden, targets, temperature)
    parts = []
    for chunk, expected in zip(hidden.split(rows), targets.split(rows), strict=True):
        if torch.is_grad_enabled():
            part = checkpoint(_log_probabilities, project, chunk, expected, temperature, use_reentrant=False)
        else:
            part = _log_probabilities(project, chunk, expected, temperature)
        parts.append(part)
    return torch.cat(parts)


def _log_probabilities(
    project: Project, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Compute the log-probability of each target, fp32 [targets]."""
    logits = project(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    return -functional.cross_entropy(logits, targets, reduction="none")


def rows_at_once(projection: nn.Module, hidden: torch.Tensor) -> int | None:
    """Return the number of targets whose logits are computed at a time; None for all of them."""
    # ZeRO-3 gathers the weights inside a wrapped projection at every call, and ranks may have different numbers of chunks.
    if not _plain_linear(projection) and any(is_partitioned(weight) for weight in projection.parameters()):
        return None
    return chunk_rows(hidden, vocabulary_size(projection))


def is_multiplied_once(projection: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether training computes the logits of hidden states in `dtype` only once, together with their gradients."""
    # The loss scale of fp16 is applied in the backward pass: too late for small gradients that are computed before it.
    return _plain_linear(projection) and dtype is not torch.float16


def _plain_linear(projection: nn.Module) -> bool:
    return type(projection) is nn.Linear and projection.bias is None


def chunk_rows(hidden: torch.Tensor, vocabulary: int) -> int:
    """Return the number of targets whose logits are computed at a time. vocabulary: its size."""
    if hidden.is_cpu:
        return max(1, CHUNK_BYTES // (hidden.element_size() * vocabulary))
    return max(TILE_ROWS, ACCELERATOR_CHUNK_BYTES // (4 * vocabulary) // TILE_ROWS * TILE_ROWS)


@cache
def supports_fp32_products(device: str, dtype: torch.dtype) -> bool:
    """Return whether a product of half-precision matrices can be returned in fp32, the format of its sums: on CUDA with torch 2.8
    and newer. That operation has no derivative, and no kernel on a CPU."""
    if device == "cpu" or dtype is torch.float32:
        return False
    matrix = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return torch.mm(matrix, matrix, out_dtype=torch.float32).dtype is torch.float32
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _loss_sum(project: Project, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(project(hidden).float(), targets, reduction="sum")


def _loss_and_hits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss sum and the number of correct targets, without gradients. fp32 log-probabilities exist for one block of rows
    at a time."""
    loss_sum = logits.new_zeros((), dtype=torch.float32)
    hits = torch.zeros((), dtype=torch.long, device=logits.device)
    block = _block_rows(logits)
    for part, expected in zip(logits.split(block), targets.split(block), strict=True):
        loss_sum -= torch.log_softmax(part, dim=-1, dtype=torch.float32).gather(1, expected[:, None]).sum()
        hits += (part.argmax(dim=-1) == expected).sum()
    return loss_sum, hits


def _block_rows(logits: torch.Tensor) -> int:
    return max(1, BLOCK_ELEMENTS.get(logits.device.type, 2**24) // logits.shape[-1])


def vocabulary_size(projection: nn.Module) -> int:
    """Return the number of logits: the rows of the projection's largest weight, even if an adapter wraps the projection."""
    return max(full_shape(weight)[0] for weight in projection.parameters())


class BlockLoss(Protocol):
    """Computes a loss of logits and its gradient, a block of rows at a time."""

    def __call__(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of the losses, scalar fp32; gradient of that sum, fp32 [rows, vocabulary]).

        logits: [rows, vocabulary], those of the targets in `rows`.
        """


class BlockCrossEntropy(NamedTuple):
    targets: torch.Tensor

    def __call__(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        at_target = self.targets[rows][:, None]
        loss_sum = -probabilities.gather(1, at_target).sum()
        return loss_sum, probabilities.exp_().scatter_add_(1, at_target, probabilities.new_full(at_target.shape, -1.0))


class LinearLoss(torch.autograd.Function):
    """A loss of the logits `hidden @ weight.T` that computes its gradients in the forward pass."""

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, weight: torch.Tensor, block_loss: BlockLoss, rows: int
    ) -> torch.Tensor:
        """Compute the loss block by block. hidden: [targets, hidden size]; weight: [vocabulary, hidden size]; rows: per chunk."""
        of_hidden, of_weight, _, _ = context.needs_input_grad
        hidden_gradient = torch.empty_like(hidden) if of_hidden else None
        weight_gradient: torch.Tensor | None = None
        loss_sum = hidden.new_zeros((), dtype=torch.float32)
        # One buffer for all chunks: two chunks never exist at once, and the system maps the pages only once.
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        wide = supports_fp32_products(hidden.device.type, hidden.dtype)
        product: torch.Tensor | None = None
        start = 0
        for chunk in hidden.split(rows):
            logits = buffer[: len(chunk)]
            exact = torch.mm(chunk, weight.t(), **({"out_dtype": torch.float32} if wide else {"out": logits}))
            block, first = _block_rows(logits), start
            for part, to in zip(exact.split(block), logits.split(block), strict=True):
                loss, gradient = block_loss(part, slice(first, first + len(part)))
                loss_sum += loss
                to.copy_(gradient)  # the gradient replaces the logits
                first += len(part)
            if hidden_gradient is not None:
                torch.mm(logits, weight, out=hidden_gradient[start : start + len(chunk)])
            start += len(chunk)
            if of_weight:
                # Sum several chunks in fp32, as a single multiplication does internally.
                if weight_gradient is None:
                    product = logits.t() @ chunk
                    weight_gradient = product if len(chunk) == len(hidden) else product.float()
                elif product is weight_gradient:
                    weight_gradient.addmm_(logits.t(), chunk)
                else:
                    assert product is not None
                    torch.mm(logits.t(), chunk, out=product)
                    # In pieces: adding all of it at once, a CPU would make an fp32 copy of the product.
                    for to, part in zip(weight_gradient.split(SCALED_ROWS), product.split(SCALED_ROWS), strict=True):
                        to += part
        context.save_for_backward(hidden_gradient, weight_gradient)
        context.weight_dtype = weight.dtype
        return loss_sum

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = gradients  # fp32: rounded to bf16, it would scale all gradients wrongly by up to 0.4%
        hidden_gradient, weight_gradient = context.saved_tensors
        if hidden_gradient is not None:
            hidden_gradient = (hidden_gradient.float() * scale).to(hidden_gradient.dtype)
        if weight_gradient is not None:
            scaled = torch.empty_like(weight_gradient, dtype=context.weight_dtype)
            for to, part in zip(scaled.split(SCALED_ROWS), weight_gradient.split(SCALED_ROWS), strict=True):
                to.copy_(part.float() * scale)
            weight_gradient = scaled
        return hidden_gradient, weight_gradient, None, None
