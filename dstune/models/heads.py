"""What a task computes from a batch: the sum of its losses and what its metrics need.

A head gets `forward` (DeepSpeed's engine, or a plain model in tests) and a batch; it never divides by anything, because
the weight of a window is known to the trainer only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import PreTrainedModel

from dstune.config.task_schema import CausalLmConfig, ChatConfig, ClassificationConfig, TaskConfig

IGNORED = -100
"""Label of a position that is no target."""

Forward = Callable[..., Any]
Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class HeadOutput:
    loss_sum: torch.Tensor
    """Sum of the losses of all targets, scalar fp32 with a graph."""
    weight: torch.Tensor
    """Number of targets, scalar."""
    correct: torch.Tensor
    """Targets that the most probable prediction hits, scalar."""
    predictions: torch.Tensor | None = None
    """Classification: the predicted class of each row, [batch]; with several labels a row 0 and 1, [batch, labels]."""


class Head(Protocol):
    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput: ...


def build_head(task: TaskConfig, model: PreTrainedModel) -> Head:
    """The head of a task; must be built before DeepSpeed puts its own hooks on the model."""
    match task:
        case ChatConfig() | CausalLmConfig():
            return CausalLmHead(model)
        case ClassificationConfig():
            return multi_label_head if task.multi_label else classification_head


class CausalLmHead:
    """Next-token cross entropy, computed at the positions that have a target and at no other.

    Logits of the others are most of the memory and up to a fifth of the time of a small model, so a hook in front of the
    vocabulary projection keeps only the hidden states whose next token is a target: [batch, sequence, hidden] becomes
    [targets, hidden]. What the model does after its projection (soft-capping, scaling) is elementwise and stays as it is.
    """

    def __init__(self, model: PreTrainedModel):
        self._kept: torch.Tensor | None = None
        projection = model.get_output_embeddings()
        assert isinstance(projection, nn.Module), f"{type(model).__name__} has no vocabulary projection"
        projection.register_forward_pre_hook(self._keep_targets)

    def _keep_targets(self, projection: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._kept is None:
            return None
        hidden, *rest = inputs
        return (hidden[self._kept], *rest)

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """batch: input_ids, labels [batch, sequence], and either attention_mask or position_ids of packed rows."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        # The label of the next position is the target of this one; the last position has none.
        targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        self._kept = targets != IGNORED
        targets = targets[self._kept]
        try:
            # Packed rows are told apart only without a cache; with it they contaminate each other silently.
            logits = forward(**inputs, use_cache=False).logits
        finally:
            self._kept = None
        loss_sum = functional.cross_entropy(logits.float(), targets, reduction="sum")
        return HeadOutput(
            loss_sum=loss_sum,
            weight=torch.tensor(targets.numel()),
            correct=(logits.detach().argmax(dim=-1) == targets).sum(),
        )


def classification_head(forward: Forward, batch: Batch) -> HeadOutput:
    """Cross entropy over the classes. batch: input_ids, attention_mask [batch, sequence], labels [batch]."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
    labels = batch["labels"]
    logits = forward(**inputs).logits.float()
    predictions = logits.detach().argmax(dim=-1)
    return HeadOutput(
        loss_sum=functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"),
        weight=(labels != IGNORED).sum(),
        correct=(predictions == labels).sum(),
        predictions=predictions,
    )


def multi_label_head(forward: Forward, batch: Batch) -> HeadOutput:
    """Binary cross entropy of every label, meaned over the labels of a row, so that a row counts as one target.

    batch: input_ids, attention_mask [batch, sequence], labels [batch, labels] of 0 and 1. A label is predicted where
    its probability is above 0.5, and a row is correct where all of its labels are.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
    labels = batch["labels"]
    logits = forward(**inputs).logits.float()
    counted = labels[:, 0] != IGNORED
    # A filler's rows take part with the weight 0: leaving them out would leave its ranks without a graph.
    wanted = labels.clamp(min=0).float()
    losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
    predictions = (logits.detach() > 0).long()
    return HeadOutput(
        loss_sum=(losses * counted).sum(),
        weight=counted.sum(),
        correct=((predictions == labels).all(dim=1) & counted).sum(),
        predictions=predictions,
    )
