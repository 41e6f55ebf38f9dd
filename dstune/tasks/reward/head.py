"""The head of reward models."""

from __future__ import annotations

import torch.nn.functional as functional

from dstune.models.heads.base import Batch, Forward, HeadOutput, inputs_of


def reward_head(forward: Forward, batch: Batch) -> HeadOutput:
    """Compute the loss of Bradley and Terry (1952), in whose model the better answer wins with
    probability sigmoid(its score - the other's).

    batch: input_ids, attention_mask [2 pairs, sequence], the better answers first; margin [pairs], by how much the better
    one has to win at least (Touvron et al. 2023, arXiv:2307.09288, equation 2); counted [pairs], 0 in a filler.
    """
    better, worse = forward(**inputs_of(batch)).logits.float().view(2, -1)
    counted = batch["counted"]
    losses = -functional.logsigmoid(better - worse - batch["margin"])
    seen_better, seen_worse = better.detach() * counted, worse.detach() * counted
    return HeadOutput(
        loss_sum=(losses * counted).sum(),
        weight=counted.sum(),
        correct=((seen_better > seen_worse) & (counted > 0)).sum(),
        sums={"reward_chosen": seen_better.sum(), "reward_rejected": seen_worse.sum()},
    )
