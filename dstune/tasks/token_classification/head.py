"""The head of token classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional

from dstune.models.heads.base import IGNORED, Batch, Forward, HeadOutput, inputs_of


def token_classification_head(forward: Forward, batch: Batch) -> HeadOutput:
    """Compute the cross entropy over the tags of the tokens that have one.

    batch: input_ids, attention_mask, labels [batch, sequence]; with `word_start` (0 or 1) the words' first tokens are
    told from others that have labels too. Of each row an evaluation keeps the tags of its words' first tokens.
    """
    labels = batch["labels"]
    logits = forward(**inputs_of(batch)).logits.float()
    predictions = logits.detach().argmax(dim=-1)
    losses = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    rows: dict[str, torch.Tensor | Sequence[torch.Tensor]] = {}
    if not torch.is_grad_enabled():
        starts = labels != IGNORED
        if "word_start" in batch:
            starts &= batch["word_start"] > 0
        counts = starts.sum(dim=1).tolist()
        rows = {
            "prediction": predictions[starts].cpu().split(counts),
            "label": labels[starts].cpu().split(counts),
            "loss": losses.sum(dim=1),
            "weight": (labels != IGNORED).sum(dim=1),
            "correct": (predictions == labels).sum(dim=1),
        }
    return HeadOutput(
        loss_sum=losses.sum(), weight=(labels != IGNORED).sum(), correct=(predictions == labels).sum(), rows=rows
    )
