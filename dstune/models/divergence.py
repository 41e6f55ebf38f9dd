"""Divergence of a student's next-token distribution from its teacher's over the entire vocabulary, a chunk of logits at a time.

The teacher is given by its hidden states at the targets. Both projections are computed for one chunk of targets at a time, and
the gradient replaces the student's logits, as for the cross entropy (`models.cross_entropy`). Hidden states of 4,096
numbers in bf16 take 8 KB a target, logits of 152,064 tokens 304 KB.

With s and t the distributions of student and teacher at a temperature, and M = beta * t + (1 - beta) * s, the divergence is the
generalised Jensen-Shannon divergence D = beta * KL(t || M) + (1 - beta) * KL(s || M) (Agarwal et al. 2024, arXiv:2306.13649,
equation 2, with beta on the teacher's side as TRL has it). At beta 0 it is defined as KL(t || s), at 1 as KL(s || t).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dstune.models.cross_entropy import LinearLoss, Project, is_multiplied_once, rows_at_once
from dstune.models.logit_transform import LogitTransform


@dataclass(frozen=True)
class Objective:
    """Loss that a student is trained with at each target."""

    beta: float
    temperature: float
    text_weight: float = 0.0
    """Share of the cross entropy of the text's own token in the loss."""


@dataclass(frozen=True)
class Measured:
    """Sums over the targets of a batch, scalars fp32 without a graph."""

    text_loss: Tensor
    """Cross entropy of the student."""
    correct: Tensor
    teacher_text_loss: Tensor


@dataclass(frozen=True)
class BlockDivergence:
    """`cross_entropy.BlockLoss`: the loss of the targets whose hidden states the teacher has."""

    objective: Objective
    transform: LogitTransform
    """Transforms the student's logits."""
    taught: Callable[[slice], Tensor]
    """The teacher's logits of some targets, fp32 [targets, vocabulary]; the first of its tokens are the student's."""
    targets: Tensor

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        student_logits = self.transform(logits.float())
        taught = self.taught(rows)
        count = min(student_logits.shape[-1], taught.shape[-1])
        loss, gradient = divergence_and_gradient(student_logits[:, :count], taught[:, :count], self.objective)
        if self.objective.text_weight:
            gradient.mul_(1 - self.objective.text_weight)
            logps = torch.log_softmax(student_logits[:, :count], dim=-1)
            target_ids = self.targets[rows][:, None]
            text_loss = -logps.gather(1, target_ids).sum()
            loss = (1 - self.objective.text_weight) * loss + self.objective.text_weight * text_loss
            gradient.add_(logps.exp_(), alpha=self.objective.text_weight)
            gradient.scatter_add_(1, target_ids, gradient.new_full(target_ids.shape, -self.objective.text_weight))
        if count < student_logits.shape[-1]:  # entries that represent no token
            gradient = nn.functional.pad(gradient, (0, student_logits.shape[-1] - count))
        return loss, self.transform.before(gradient, student_logits)


def divergence_and_gradient(student_logits: Tensor, taught: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return (sum of the divergences, scalar; its gradient for `student_logits`). Both logits: fp32 [targets, vocabulary]."""
    beta, temperature = objective.beta, objective.temperature
    log_s = torch.log_softmax(student_logits / temperature, dim=-1)
    log_t = torch.log_softmax(taught / temperature, dim=-1)
    s = log_s.exp()
    if beta == 0.0:
        t = log_t.exp()
        loss = (t * (log_t - log_s)).sum()
        return loss, (s - t).div_(temperature)
    if beta == 1.0:
        difference = log_s - log_t
        each = (s * difference).sum(dim=-1, keepdim=True)
        return each.sum(), s.mul_(difference.sub_(each)).div_(temperature)
    # log(M / s) from log(t / s): near the end of training, a difference of logarithms of M and s would be only rounding.
    exceeds = log_t - log_s
    share = torch.where(exceeds > 0, 1 - beta, beta)
    difference = torch.expm1(-exceeds.abs()).mul_(share).log1p_().add_(exceeds.clamp(min=0)).neg_()
    each = (s * difference).sum(dim=-1, keepdim=True)
    loss = beta * (log_t.exp_() * exceeds.add_(difference)).sum() + (1 - beta) * each.sum()
    return loss, s.mul_(difference.sub_(each)).mul_((1 - beta) / temperature)


class _OfLogits(torch.autograd.Function):
    """A block loss of logits that exist already."""

    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, logits: Tensor, block_loss: BlockDivergence, first: int
    ) -> Tensor:
        loss, gradient = block_loss(logits, slice(first, first + len(logits)))
        context.save_for_backward(gradient)  # in fp32: a loss scale is applied only in the backward pass
        context.dtype = logits.dtype  # type: ignore[attr-defined]
        return loss

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors  # type: ignore[attr-defined]
        return (gradient * gradients[0]).to(context.dtype), None, None  # type: ignore[attr-defined]


def projected_divergence(
    projection: nn.Module, project: Project, hidden: Tensor, block_loss: BlockDivergence
) -> Tensor:
    """Return the sum of the losses of `project(hidden)`, scalar fp32. Call it inside the forward pass of `projection` (see
    `cross_entropy.projected_cross_entropy`). hidden: [targets, hidden size]."""
    rows = rows_at_once(projection, hidden) or max(1, len(hidden))
    if torch.is_grad_enabled() and is_multiplied_once(projection, hidden.dtype):
        loss_sum: Tensor = LinearLoss.apply(hidden, projection.weight, block_loss, rows)
        return loss_sum
    loss_sum = hidden.new_zeros((), dtype=torch.float32)
    first = 0
    for some in hidden.split(rows):  # no targets make one empty chunk, which gives all weights a gradient of zeros
        if torch.is_grad_enabled():
            loss = checkpoint(_projected, project, some, block_loss, first, use_reentrant=False)
        else:
            loss = _projected(project, some, block_loss, first)
        loss_sum = loss_sum + loss
        first += len(some)
    return loss_sum


def _projected(project: Project, hidden: Tensor, block_loss: BlockDivergence, first: int) -> Tensor:
    return divergence_of_logits(project(hidden), block_loss, first)


def divergence_of_logits(logits: Tensor, block_loss: BlockDivergence, first: int = 0) -> Tensor:
    """Return the sum of the losses of logits that exist already. first: number of their first target."""
    loss_sum: Tensor = _OfLogits.apply(logits, block_loss, first)
    return loss_sum


def measured_divergence(
    project: Project, hidden: Tensor, block_loss: BlockDivergence, rows: int
) -> tuple[Tensor, Measured]:
    """Return the sum of the losses without gradients, and the other sums that an evaluation reports. rows: targets per chunk."""
    loss_sum = hidden.new_zeros((), dtype=torch.float32)
    sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    first = 0
    for some in hidden.split(rows):
        logits = project(some)
        part = slice(first, first + len(some))
        loss_sum += block_loss(logits, part)[0]
        sums += _text_sums(block_loss.transform(logits.float()), block_loss.taught(part), block_loss.targets[part])
        first += len(some)
    return loss_sum, Measured(sums[0], sums[1], sums[2])


def _text_sums(student_logits: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
    """Return the sums of the student's cross entropy, its correct targets and the teacher's cross entropy, float64 [3]."""
    target_ids = targets[:, None]
    losses = [-torch.log_softmax(logits, dim=-1).gather(1, target_ids).sum() for logits in (student_logits, taught)]
    correct = (student_logits.argmax(dim=-1) == targets).sum()
    return torch.stack([losses[0].double(), correct.double(), losses[1].double()])
