"""The keys of `method=importance`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting
from dstune.protocols.method import MethodConfig


class Selection(Enum):
    squared_gradient = "squared_gradient"
    gradient_weight = "gradient_weight"
    movement = "movement"
    ablation = "ablation"
    magnitude = "magnitude"
    random = "random"


class Unit(Enum):
    entries = "entries"
    tensors = "tensors"


@dataclass(frozen=True)
class ImportanceConfig(MethodConfig):
    """Only the most important share of the weights is trained; the others keep every bit, and the scores are reported.

    Use it to learn which weights a task needs, or to change only a few. Gradient-based scores are compared with ablation (rank
    correlation in importance.json and in the report). Training single entries saves no memory; training whole tensors does
    (`method.unit`).
    """

    name: str = "importance"
    selection: Selection = Selection.gradient_weight
    """Score: squared gradient, |gradient x weight| (arXiv:1611.06440), movement (arXiv:2005.07683), loss without it (ablation);
    magnitude and random to compare with."""
    unit: Unit = Unit.entries
    """Choose single entries, by a mask, or whole tensors, which saves gradients and optimizer states as well."""
    share: float = setting(0.1, above=0.0, below=1.0)
    """Share of the pretrained weights that is trained; new weights (a head) always are."""
    score_steps: int = setting(8, at_least=1)
    """Optimizer steps of a throw-away training along which gradients are scored."""
    ablation_rows: int = setting(0, at_least=0)
    """Validation rows on which the loss is measured without each tensor in turn; 0 skips this."""
