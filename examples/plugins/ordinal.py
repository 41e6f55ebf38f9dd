"""task=ordinal: labels whose order means something, such as stars or grades.

The head computes CORN (Shi, Cao and Raschka 2023, arXiv:2111.08851): output k is the probability that a row is above label k,
given that it is not below; a row's probabilities follow by the chain rule, and its prediction never contradicts the order.

dstune train plugins=[examples/plugins/ordinal.py] task=ordinal 'task.labels=[bad,fair,good]' data.train=rows.jsonl ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import dstune
from dstune.config.fields import setting
from dstune.tasks.classification import Classification
from dstune.tasks.classification.config import ClassificationConfig


@dataclass(frozen=True)
class OrdinalConfig(ClassificationConfig):
    """A label for a text, from labels in an order: `labels` names them, the lowest first."""

    name: str = "ordinal"
    smoothing: float = setting(0.0, at_least=0.0, below=0.5)
    """Share of each decision that is left to the other side."""


@dstune.task
class Ordinal(Classification):
    Config = OrdinalConfig
    config: OrdinalConfig
    choice_settings: ClassVar = {"data": {"packing": False}}
    few_shot = False
    ranked_by = (("mae", True),)

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss", "accuracy", "f1_macro", "f1_micro", "mcc", "auroc", "mae")

    def check(self, run: Any) -> Iterator[dstune.Problem]:
        config = self.config
        if len(config.labels) < 3:
            fix = "task.labels=[LOWEST,...,HIGHEST]; two labels are task=classification"
            yield dstune.Problem("task.labels", "the order of at least three labels has to be given", fix)
        for key in ("multi_label", "regression", "focal_gamma", "balanced", "class_weights"):
            if getattr(config, key):
                yield dstune.Problem(f"task.{key}", "an order has no such setting", f"leave out task.{key}")

    def head(self, model: Any, rows: Any = None) -> Any:
        return CornHead(self.config.smoothing)

    def measure(self, labels: tuple[str, ...], split: Any, totals: Any, kept: Sequence[Mapping[str, Any]]) -> Any:
        measured = super().measure(labels, split, totals, kept)
        distances = [abs(true - found) for true, found in measured.predictions]
        return replace(measured, metrics={**measured.metrics, "mae": sum(distances) / len(distances)})


class CornHead:
    """batch: input_ids, attention_mask [batch, sequence], labels [batch]. The last output of the classifier is not used."""

    def __init__(self, smoothing: float):
        self._smoothing = smoothing

    def __call__(self, forward: Any, batch: Any) -> Any:
        import torch
        import torch.nn.functional as functional

        from dstune.models.heads.base import IGNORED, HeadOutput, inputs_of

        labels = batch["labels"]
        logits = forward(**inputs_of(batch)).logits.float()[:, :-1]  # [batch, labels - 1]
        counted = labels != IGNORED
        steps = torch.arange(logits.shape[1], device=logits.device)
        in_subset = (labels[:, None] >= steps) & counted[:, None]  # whether it is above k is a question from k on only
        above = (labels[:, None] > steps).float() * (1 - 2 * self._smoothing) + self._smoothing
        each = functional.binary_cross_entropy_with_logits(logits, above, reduction="none") * in_subset
        losses = each.sum(dim=1) / in_subset.sum(dim=1).clamp(min=1)
        reached = torch.cat([torch.ones_like(logits[:, :1]), logits.sigmoid().cumprod(dim=1)], dim=1).detach()
        probability = reached - torch.cat([reached[:, 1:], torch.zeros_like(reached[:, :1])], dim=1)
        predictions = (reached[:, 1:] > 0.5).sum(dim=1)
        rows = {
            "prediction": predictions,
            "label": labels,
            "probability": probability,
            "loss": losses.detach(),
            "weight": counted,
            "correct": predictions == labels,
        }
        return HeadOutput(
            loss_sum=(losses * counted).sum(),
            weight=counted.sum(),
            correct=((predictions == labels) & counted).sum(),
            rows={} if torch.is_grad_enabled() else rows,
        )
