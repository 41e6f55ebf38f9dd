"""The divergence of the model's next-token distributions from its teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dstune.models.adapters import without_adapters
from dstune.models.cross_entropy import rows_at_once
from dstune.models.divergence import (
    BlockDivergence,
    Measured,
    Objective,
    divergence_of_logits,
    measured_divergence,
    projected_divergence,
)
from dstune.models.heads.base import Batch, Forward, HeadOutput, Rows
from dstune.models.heads.language import KEPT, TARGETS, positions_with_target
from dstune.models.logit_transform import LogitTransform
from dstune.tasks.distillation.config import DistillationConfig
from dstune.tasks.distillation.teacher import ChunkedLogits, ProbedHead, Teacher, TeacherLogits


class DistillationHead(ProbedHead):
    """Computes the loss of each target from the hidden states of model and teacher, with the logits of one chunk of targets at a
    time."""

    def __init__(
        self, task: DistillationConfig, model: PreTrainedModel, teacher: Teacher | None, rows: Rows | None = None
    ):
        """teacher: None for the model itself with its adapter switched off."""
        super().__init__(model, rows)
        self._model, self._teacher = model, teacher
        self._objective = Objective(task.beta, task.temperature, task.text_weight)
        self._block_loss: BlockDivergence | None = None
        self._measured: Measured | None = None

    def _loss(self, forward: Forward, inputs: Mapping[str, Any], labels: Tensor, batch: Batch) -> HeadOutput:
        width = labels.shape[1]
        positions = batch[KEPT] if KEPT in batch else positions_with_target(labels)
        targets = batch[TARGETS] if KEPT in batch else labels.flatten().index_select(0, positions)
        with torch.no_grad():  # before the model's pass, so that its activations are not in memory yet
            teacher_logits = self._teacher_logits(forward, inputs, batch, positions, width)
        transform = self.transform if self._examined else LogitTransform()
        block_loss = self._block_loss = BlockDivergence(self._objective, transform, teacher_logits, targets)
        self._projected_positions, self._targets = (positions, width), targets if self._examined else None
        try:
            with transform.switched_off():
                output = forward(**inputs, use_cache=False).logits
        finally:
            measured, self._measured = self._measured, None
            self._block_loss = self._projected_positions = self._targets = None
        if self._examined:
            loss_sum = output.float()
        elif torch.is_grad_enabled():
            loss_sum = divergence_of_logits(output, block_loss)
        else:
            loss_sum, measured = measured_divergence(_unchanged, output, block_loss, max(1, len(output)))
        sums, correct = dict[str, Tensor](), torch.zeros((), device=loss_sum.device)
        if measured is not None:
            correct = measured.correct
            sums = {"text_loss": measured.text_loss, "teacher_text_loss": measured.teacher_text_loss}
        return HeadOutput(loss_sum=loss_sum, weight=torch.tensor(targets.numel()), correct=correct, sums=sums)

    def _teacher_logits(
        self, forward: Forward, inputs: Mapping[str, Any], batch: Batch, positions: Tensor, width: int
    ) -> TeacherLogits:
        if self._teacher is None:
            return self._without_adapter(forward, inputs, positions, width)
        return self._teacher.observe(forward, batch, positions, width)

    def _without_adapter(
        self, forward: Forward, inputs: Mapping[str, Any], positions: Tensor, width: int
    ) -> ChunkedLogits:
        """Return the logits of the model with its adapter switched off."""
        with without_adapters(self._model):
            if not self._examined:
                self._projected_positions = positions, width
                try:
                    logits: Tensor = forward(**inputs, use_cache=False).logits
                finally:
                    self._projected_positions = None
                return ChunkedLogits(logits, _unchanged, LogitTransform(), max(1, len(logits)))
            hidden = self.hidden_states(forward, inputs, positions, width)
        rows = rows_at_once(self._projection, hidden) or max(1, len(hidden))
        return ChunkedLogits(hidden, self._project_without_adapter, self.transform, rows)

    def _project_without_adapter(self, hidden: Tensor) -> Tensor:
        with torch.no_grad(), without_adapters(self._model):
            return self._project(hidden)

    def _projected(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self._block_loss is None:
            return super()._projected(hidden, targets)
        if torch.is_grad_enabled():
            return projected_divergence(self._projection, self._project, hidden, self._block_loss)
        rows = rows_at_once(self._projection, hidden) or max(1, len(hidden))
        loss_sum, self._measured = measured_divergence(self._project, hidden, self._block_loss, rows)
        return loss_sum


def _unchanged(logits: Tensor) -> Tensor:
    return logits
