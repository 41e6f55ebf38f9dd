"""The heads of language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import PreTrainedModel

from dstune.models.cross_entropy import CrossEntropy, projected_cross_entropy, vocabulary_size
from dstune.models.heads.base import IGNORED, Batch, Forward, HeadOutput, Rows, inputs_of


class CausalLmHead:
    """Next-token cross entropy, computed at the positions that have a target and at no other.

    Logits of the others are most of the memory and up to a fifth of the time of a small model, so the vocabulary
    projection is given only the hidden states whose next token is a target: [batch, sequence, hidden] becomes
    [targets, hidden]. Once `examine` has shown that the model does nothing with its logits (no soft-capping, no scaling),
    the projection answers with the loss itself and never makes all logits (`models.cross_entropy`).
    """

    def __init__(self, model: PreTrainedModel, rows: Rows | None = None):
        """rows: how they are handed to the model, where not as they are."""
        self.rows = rows
        projection = model.get_output_embeddings()
        assert isinstance(projection, nn.Module), f"{type(model).__name__} has no vocabulary projection"
        self._projection, self._project = projection, projection.forward
        self._kept: torch.Tensor | None = None
        self._targets: torch.Tensor | None = None
        self._found: CrossEntropy | None = None
        self._examined = False
        self._probe: torch.Tensor | None = None
        projection.forward = self._forward

    def examine(self, forward: Forward, device: torch.device) -> bool:
        """Whether the model's output is what its projection gives. At ZeRO-3 every rank must call this."""
        self._probe = torch.linspace(-60.0, 60.0, vocabulary_size(self._projection), device=device)
        try:
            with torch.no_grad():
                inputs = self._probe_inputs(torch.zeros(1, 2, dtype=torch.long, device=device))
                logits = forward(**inputs, use_cache=False).logits
            probe = self._probe.to(logits.dtype)
            self._examined = logits.shape[-1:] == probe.shape and torch.equal(logits, probe.expand_as(logits))
        finally:
            self._probe = None
        return self._examined

    def logits(self, forward: Forward, inputs: Mapping[str, Any], kept: torch.Tensor) -> torch.Tensor:
        """Logits of some positions, [positions, vocabulary], in the order of rows. kept: which, bool [rows, sequence]."""
        self._kept = kept
        try:
            found: torch.Tensor = forward(**inputs, use_cache=False).logits
        finally:
            self._kept = None
        return found

    def _probe_inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens}

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """In place of the projection's own forward pass."""
        if self._probe is not None:
            return self._probe.to(hidden.dtype).expand(*hidden.shape[:-1], -1)
        if self._kept is None:
            return self._project(hidden)
        # A trained prompt stands in front of the row; none of its positions has a target.
        hidden = hidden[functional.pad(self._kept, (hidden.shape[1] - self._kept.shape[1], 0))]
        if self._targets is None:
            return self._project(hidden)
        self._found = projected_cross_entropy(self._projection, self._project, hidden, self._targets)
        return self._found.loss_sum

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """batch: input_ids, labels [batch, sequence], and either attention_mask or position_ids of packed rows. With `index`
        (an evaluation that tells single rows) the loss of each row is kept, which takes whole logits."""
        # The label of the next position is the target of this one; the last position has none.
        labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        inputs = inputs_of(batch)
        if self.rows is not None:
            inputs, labels = self.rows.own(inputs, labels)
        return self._loss(forward, inputs, labels, by_row="index" in batch)

    def _loss(self, forward: Forward, inputs: Mapping[str, Any], labels: torch.Tensor, *, by_row: bool) -> HeadOutput:
        """labels: what each position of the projected sequence is to predict, [batch, sequence]."""
        self._kept = labels != IGNORED
        targets = labels[self._kept]
        kept, by_row = self._kept, by_row and not torch.is_grad_enabled()
        self._targets = targets if self._examined and not by_row else None
        try:
            # Packed rows are told apart only without a cache; with it they contaminate each other silently.
            output = forward(**inputs, use_cache=False).logits
        finally:
            # Also of a forward pass that fails behind the projection: the next one may not take it for its own.
            found, self._found = self._found, None
            self._kept = self._targets = None
        if found is None:
            loss_sum = functional.cross_entropy(output.float(), targets, reduction="sum")
            correct = (output.detach().argmax(dim=-1) == targets).sum()
        else:
            # The output, not what was found inside: ZeRO-3 hangs its gathering for the backward pass on outputs.
            loss_sum, correct = output.float(), found.correct
        rows = _by_row(kept, output, targets) if by_row else {}
        return HeadOutput(loss_sum=loss_sum, weight=torch.tensor(targets.numel()), correct=correct, rows=rows)


def _by_row(kept: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss, weight and hits of each row, [batch]. kept: which positions the targets are of, bool [batch, sequence]."""
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    values = {"loss": losses, "weight": torch.ones_like(losses), "correct": logits.argmax(dim=-1) == targets}
    row = kept.nonzero()[:, 0]
    return {
        name: torch.zeros(len(kept), device=losses.device).index_add_(0, row, value.float())
        for name, value in values.items()
    }


class EncoderDecoderHead(CausalLmHead):
    """Cross entropy of the target's tokens, given the source and the tokens before."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        # The model's own way: which token comes first, and what stands for positions without a target.
        self._shifted = model.prepare_decoder_input_ids_from_labels
        self._adds_bias = hasattr(model, "final_logits_bias")

    def examine(self, forward: Forward, device: torch.device) -> bool:
        """As for every language model; but BART adds to its logits what a probe cannot see, since it is 0 at first."""
        return False if self._adds_bias else super().examine(forward, device)

    def _probe_inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens, "decoder_input_ids": tokens}

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """batch: input_ids, attention_mask [batch, source], labels [batch, target]."""
        # Padding follows the target, and no position attends to a later one.
        decoder = {"decoder_input_ids": self._shifted(labels=batch["labels"])}
        return self._loss(forward, inputs_of(batch) | decoder, batch["labels"], by_row="index" in batch)
