"""The head of language models."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import PreTrainedModel

from dstune.models.heads.base import IGNORED, Batch, Forward, HeadOutput, inputs_of


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
        # The label of the next position is the target of this one; the last position has none.
        targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        self._kept = targets != IGNORED
        targets = targets[self._kept]
        try:
            # Packed rows are told apart only without a cache; with it they contaminate each other silently.
            logits = forward(**inputs_of(batch), use_cache=False).logits
        finally:
            self._kept = None
        loss_sum = functional.cross_entropy(logits.float(), targets, reduction="sum")
        return HeadOutput(
            loss_sum=loss_sum,
            weight=torch.tensor(targets.numel()),
            correct=(logits.detach().argmax(dim=-1) == targets).sum(),
        )
