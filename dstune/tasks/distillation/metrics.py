"""Metrics of a distillation."""

from __future__ import annotations

from dstune.metrics.language import language_model_metrics
from dstune.trainer.measure import Totals


def distillation_metrics(totals: Totals, size: int) -> dict[str, float]:
    """Return the metrics of distillation by name: `loss` is the mean over targets of what is trained; `text_loss`, `perplexity`,
    `token_accuracy` and `bits_per_byte` are of the rows' own tokens, and `teacher_text_loss` is the teacher's loss of these.
    size: UTF-8 bytes of the targets."""
    of_text = language_model_metrics(totals.more["text_loss"], totals.weight, totals.correct, size)
    text_loss = of_text.pop("loss")
    teacher = totals.more["teacher_text_loss"] / totals.weight
    loss = totals.loss_sum / totals.weight
    return {"loss": loss, "text_loss": text_loss, "teacher_text_loss": teacher, **of_text}
