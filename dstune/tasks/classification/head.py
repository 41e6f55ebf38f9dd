"""Compute the losses of classification: one label a row, any number of labels, or a number."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from dstune.models.heads.base import IGNORED, Batch, Forward, Head, HeadOutput, inputs_of
from dstune.tasks.classification.config import ClassificationConfig


def classification_head(task: ClassificationConfig) -> Head:
    if task.regression:
        return regression_head
    return MultiLabelHead(task.focal_gamma) if task.multi_label else SingleLabelHead(task.focal_gamma)


class SingleLabelHead:
    """Cross entropy over the classes, or the focal loss.

    batch: input_ids, attention_mask [batch, sequence], labels [batch], and with class weights loss_weight [batch].
    """

    def __init__(self, focal_gamma: float = 0.0):
        self._gamma = focal_gamma

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        labels = batch["labels"]
        logits = forward(**inputs_of(batch)).logits.float()
        counted = labels != IGNORED
        weights = counted * batch.get("loss_weight", torch.ones_like(labels, dtype=torch.float32))
        losses = focal(functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"), self._gamma)
        detached = logits.detach()
        predictions = detached.argmax(dim=-1)
        rows = {
            "prediction": predictions,
            "label": labels,
            "probability": detached.softmax(dim=-1),
            "loss": (losses * weights).detach(),
            "weight": weights,
            "correct": predictions == labels,
        }
        return HeadOutput(
            loss_sum=(losses * weights).sum(),
            weight=weights.sum(),
            correct=(predictions == labels).sum(),
            rows={} if torch.is_grad_enabled() else rows,
        )


class MultiLabelHead:
    """Binary cross entropy of every label, averaged over the labels of a row, so that a row counts as one target.

    batch: input_ids, attention_mask [batch, sequence], labels [batch, labels] of 0 and 1. A label is predicted if its
    probability is above 0.5, and a row is correct if all of its labels are.
    """

    def __init__(self, focal_gamma: float = 0.0):
        self._gamma = focal_gamma

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        labels = batch["labels"]
        logits = forward(**inputs_of(batch)).logits.float()
        counted = labels[:, 0] != IGNORED
        # The rows of a filler take part with weight 0: without them its rank would have no graph.
        targets = labels.clamp(min=0).float()
        each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        losses = focal(each, self._gamma).mean(dim=1)
        detached = logits.detach()
        predictions = (detached > 0).long()
        rows = {
            "prediction": predictions,
            "label": labels,
            "probability": detached.sigmoid(),
            "loss": losses.detach(),
            "weight": counted,
            "correct": (predictions == labels).all(dim=1),
        }
        return HeadOutput(
            loss_sum=(losses * counted).sum(),
            weight=counted.sum(),
            correct=((predictions == labels).all(dim=1) & counted).sum(),
            rows={} if torch.is_grad_enabled() else rows,
        )


def regression_head(forward: Forward, batch: Batch) -> HeadOutput:
    """Compute the squared error. batch: input_ids, attention_mask [batch, sequence], labels [batch], NaN in a filler."""
    labels = batch["labels"]
    counted = ~labels.isnan()
    predictions = forward(**inputs_of(batch)).logits.float()[:, 0]
    losses = (predictions - labels.nan_to_num()).square()
    rows = {
        "prediction": predictions.detach(),
        "label": labels,
        "loss": losses.detach(),
        "weight": counted,
        "correct": torch.zeros_like(losses),
    }
    return HeadOutput(
        loss_sum=(losses * counted).sum(),
        weight=counted.sum(),
        correct=torch.zeros(()),
        rows={} if torch.is_grad_enabled() else rows,
    )


def focal(losses: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return `(1 - p)^gamma * -log(p)` from `-log(p)`, elementwise (Lin et al. 2017, arXiv:1708.02002)."""
    if not gamma:
        return losses
    # If p rounds to 1, the slope of the power would be infinite for a gamma below 1.
    return (-torch.expm1(-losses)).clamp(min=1e-12) ** gamma * losses
