"""The heads of language models."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import PreTrainedModel

from dstune.core.errors import Problem, UserError
from dstune.models.cross_entropy import CrossEntropy, projected_cross_entropy, vocabulary_size
from dstune.models.heads.base import IGNORED, Batch, Forward, HeadOutput, Rows, inputs_of

KEPT, TARGETS, STARTS, LONGEST = "kept", "targets", "starts", "longest"
"""Keys that `CausalLmHead.indexed` adds to a batch."""

HIDDEN_DIMENSIONS = 3
"""Of states that are projected to logits: [rows, positions, width]."""


class CausalLmHead:
    """Next-token cross entropy, computed at the positions that have a target and at no other.

    Logits of the others are most of the memory and up to a fifth of the time of a small model, so the vocabulary
    projection is given only the hidden states whose next token is a target: [batch, sequence, hidden] becomes
    [targets, hidden]. Once `examine` has shown that the model does nothing with its logits (no soft-capping, no scaling),
    the projection answers with the loss itself and never makes all logits (`models.cross_entropy`).
    """

    def __init__(self, model: PreTrainedModel, rows: Rows | None = None):
        """rows: converts rows for the attention; None leaves them unchanged. Raises UserError if the model names no projection."""
        self.rows = rows
        projection = model.get_output_embeddings()
        # FSMT names the table of its decoder.
        if not isinstance(projection, nn.Module) or isinstance(projection, nn.Embedding):
            reason = f"{type(model).__name__} does not name the layer that projects to logits (get_output_embeddings)"
            raise UserError(Problem("model.path", reason, "another model (`dstune models`)"))
        self._name, self._projection, self._project = type(model).__name__, projection, projection.forward
        self._projected_positions: tuple[torch.Tensor, int] | None = None
        """The positions that are projected, counted through the rows end to end, and the length of a row; None for all."""
        self._targets: torch.Tensor | None = None
        self._cross_entropy: CrossEntropy | None = None
        self._examined = False
        self._probe: torch.Tensor | None = None
        projection.forward = self._forward

    def examine(self, forward: Forward, device: torch.device) -> bool:
        """Return whether the model's output equals that of its projection. At ZeRO-3 every rank must call this."""
        logits, probe = self._probed(forward, device)
        self._examined = logits.shape[-1:] == probe.shape and torch.equal(logits, probe.expand_as(logits))
        return self._examined

    def _probed(self, forward: Forward, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's logits with a projection that outputs the same known logits at every position, and these."""
        self._probe = torch.linspace(-60.0, 60.0, vocabulary_size(self._projection), device=device)
        try:
            with torch.no_grad():
                inputs = self._probe_inputs(torch.zeros(1, 2, dtype=torch.long, device=device))
                logits: torch.Tensor = forward(**inputs, use_cache=False).logits
            return logits, self._probe.to(logits.dtype)
        finally:
            self._probe = None

    @property
    def examined(self) -> bool:
        """Whether the loss is computed without whole logits."""
        return self._examined

    def logits(self, forward: Forward, inputs: Mapping[str, Any], is_chosen: torch.Tensor) -> torch.Tensor:
        """Return logits of some positions, [positions, vocabulary], in the order of rows. is_chosen: which, bool [rows,
        sequence]."""
        self._projected_positions = _indices(is_chosen).to(inputs["input_ids"].device), is_chosen.shape[1]
        try:
            logits: torch.Tensor = forward(**inputs, use_cache=False).logits
        finally:
            self._projected_positions = None
        return logits

    def _probe_inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens}

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Replace the projection's forward pass. Raises UserError if it does not get one state for each position (ProphetNet
        projects several predictions of a position at once)."""
        if hidden.dim() > HIDDEN_DIMENSIONS:
            reason = f"{self._name} projects states of {hidden.dim()} dimensions to logits, in place of [rows, positions, width]"
            raise UserError(Problem("model.path", reason, "another model (`dstune models`)"))
        if self._probe is not None:
            return self._probe.to(hidden.dtype).expand(*hidden.shape[:-1], -1)
        if self._projected_positions is None:
            return self._project(hidden)
        positions, width = self._projected_positions
        if in_front := hidden.shape[1] - width:  # a trained prompt; none of its positions has a target
            positions = positions + (positions // width + 1) * in_front
        hidden = hidden.flatten(0, 1).index_select(0, positions)
        if self._targets is None:
            return self._project(hidden)
        return self._projected(hidden, self._targets)

    def _projected(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss as the projection's output, instead of logits. hidden: [targets, hidden size]; targets: [targets]."""
        self._cross_entropy = projected_cross_entropy(self._projection, self._project, hidden, targets)
        return self._cross_entropy.loss_sum

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """Compute the loss. batch: input_ids, labels [batch, sequence], and either attention_mask or position_ids of packed
        rows. With `index` (an evaluation that reports single rows) the loss of each row is kept, which needs all logits."""
        labels, inputs = self.labels_of(batch), inputs_of(batch, next(self._projection.parameters()).dtype)
        if self.rows is not None:
            boundaries = (batch[STARTS], int(batch[LONGEST])) if STARTS in batch else None
            inputs, labels = self.rows.model_inputs(inputs, labels, boundaries)
        return self._loss(forward, inputs, labels, batch)

    def labels_of(self, batch: Batch) -> torch.Tensor:
        """Return the target of each position: the label of the next one. The last position has no target."""
        return functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)

    def indexed(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Add the positions with a target and the boundaries of samples to a batch in host memory: if it were on a device, the host
        would have to wait for them."""
        if self.rows is not None and not self.rows.whole:
            return dict(batch)
        labels = self.labels_of(batch)
        positions = positions_with_target(labels)
        indices = {KEPT: positions, TARGETS: labels.flatten().index_select(0, positions)}
        if self.rows is not None and (boundaries := self.rows.boundaries(inputs_of(batch))):
            starts, longest = boundaries
            indices |= {STARTS: starts, LONGEST: torch.tensor(longest)}
        return dict(batch) | indices

    def _loss(self, forward: Forward, inputs: Mapping[str, Any], labels: torch.Tensor, batch: Batch) -> HeadOutput:
        """Compute the loss. labels: the target of each position of the projected sequence, [batch, sequence]."""
        positions = batch[KEPT] if KEPT in batch else positions_with_target(labels)
        targets = batch[TARGETS] if KEPT in batch else labels.flatten().index_select(0, positions)
        by_row = "index" in batch and not torch.is_grad_enabled()
        self._projected_positions = positions, labels.shape[1]
        self._targets = targets if self._examined and not by_row else None
        try:
            # Without a cache, packed samples stay apart; with one, they would silently see each other.
            output = forward(**inputs, use_cache=False).logits
        finally:
            # Reset also if the forward pass fails after the projection, so that the next pass does not use the old values.
            projected, self._cross_entropy = self._cross_entropy, None
            self._projected_positions = self._targets = None
        if projected is None:
            loss_sum = functional.cross_entropy(output.float(), targets, reduction="sum")
            correct = (output.detach().argmax(dim=-1) == targets).sum()
        else:
            # The model's output, not the loss stored by the projection: ZeRO-3's hooks for the backward pass are on outputs.
            loss_sum, correct = output.float(), projected.correct
        # A filler row after the counted ones has no target (`data.images.batch.blank_sample`).
        rows = _by_row(positions // labels.shape[1], len(batch["index"]), output, targets) if by_row else {}
        return HeadOutput(loss_sum=loss_sum, weight=torch.tensor(targets.numel()), correct=correct, rows=rows)


def positions_with_target(labels: torch.Tensor) -> torch.Tensor:
    """Return the indices of positions with a target, in all rows end to end."""
    return _indices(labels != IGNORED)


def _indices(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)


def _by_row(row: torch.Tensor, rows: int, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return loss, weight and hits of each row, [rows]. row: which one each target is of."""
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    values = {"loss": losses, "weight": torch.ones_like(losses), "correct": logits.argmax(dim=-1) == targets}
    return {
        name: torch.zeros(rows, device=losses.device).index_add_(0, row, value.float())
        for name, value in values.items()
    }


def decoder_inputs_from_labels(model: PreTrainedModel) -> Callable[..., torch.Tensor]:
    """Return the model's function from labels [batch, target] to the inputs of its decoder, which knows the start token and the
    token for positions without a target.

    Most classes have a method for it; M2M100 (NLLB), Blenderbot and a few more only have a function in their module, which their
    `forward` calls. Raises UserError if there is neither.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return base.prepare_decoder_input_ids_from_labels
    shift = getattr(sys.modules[type(base).__module__], "shift_tokens_right", None)
    if shift is None:
        raise UserError(
            Problem(
                "model.path",
                f"{type(base).__name__} does not say what its decoder reads in training: its class has no "
                "prepare_decoder_input_ids_from_labels, its module no shift_tokens_right",
                "another encoder-decoder model (`dstune models`)",
            )
        )
    settings = [base.config.pad_token_id, base.config.decoder_start_token_id]
    with_start = "decoder_start_token_id" in inspect.signature(shift).parameters
    return lambda labels: shift(labels, *settings[: 2 if with_start else 1])


class EncoderDecoderHead(CausalLmHead):
    """Cross entropy of the target's tokens, given the source and the preceding tokens."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self._shifted = decoder_inputs_from_labels(model)
        self._adds_bias = hasattr(model, "final_logits_bias")

    def examine(self, forward: Forward, device: torch.device) -> bool:
        """Examine like any language model, except for BART's bias of the logits, which is 0 at first, so that a probe cannot see
        it."""
        return False if self._adds_bias else super().examine(forward, device)

    def _probe_inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens, "decoder_input_ids": tokens}

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput:
        """Compute the loss. batch: input_ids, attention_mask [batch, source], labels [batch, target]."""
        # Padding follows the target, and no position attends to a later one.
        decoder = {"decoder_input_ids": self._shifted(labels=batch["labels"])}
        return self._loss(forward, inputs_of(batch) | decoder, batch["labels"], batch)

    def labels_of(self, batch: Batch) -> torch.Tensor:
        return batch["labels"]
