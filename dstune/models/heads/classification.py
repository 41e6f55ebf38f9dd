"""Heads of classification: one label a row, or any number of them."""

from __future__ import annotations

import torch.nn.functional as functional

from dstune.models.heads.base import IGNORED, Batch, Forward, HeadOutput, inputs_of


def classification_head(forward: Forward, batch: Batch) -> HeadOutput:
    """Cross entropy over the classes. batch: input_ids, attention_mask [batch, sequence], labels [batch]."""
    labels = batch["labels"]
    logits = forward(**inputs_of(batch)).logits.float()
    predictions = logits.detach().argmax(dim=-1)
    return HeadOutput(
        loss_sum=functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"),
        weight=(labels != IGNORED).sum(),
        correct=(predictions == labels).sum(),
        rows={"prediction": predictions, "label": labels},
    )


def multi_label_head(forward: Forward, batch: Batch) -> HeadOutput:
    """Binary cross entropy of every label, meaned over the labels of a row, so that a row counts as one target.

    batch: input_ids, attention_mask [batch, sequence], labels [batch, labels] of 0 and 1. A label is predicted where
    its probability is above 0.5, and a row is correct where all of its labels are.
    """
    labels = batch["labels"]
    logits = forward(**inputs_of(batch)).logits.float()
    counted = labels[:, 0] != IGNORED
    # A filler's rows take part with the weight 0: leaving them out would leave its ranks without a graph.
    wanted = labels.clamp(min=0).float()
    losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
    predictions = (logits.detach() > 0).long()
    return HeadOutput(
        loss_sum=(losses * counted).sum(),
        weight=counted.sum(),
        correct=((predictions == labels).all(dim=1) & counted).sum(),
        rows={"prediction": predictions, "label": labels},
    )
