"""The keys of `task=classification`."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.task import TaskConfig


@dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """A label, or several, for a text or a pair of texts."""

    name: str = "classification"
    labels: list[str] = setting([])
    """Label names in the order of their indices; found in the training rows when empty."""
    multi_label: bool = False
    """Allow any number of labels for a row, each predicted independently (binary cross entropy, threshold 0.5)."""
    regression: bool = False
    """The label is a number that the model predicts (mean squared error)."""
    class_weights: dict[str, float] = setting({})
    """Weight of a class in the loss, by its name; 1 for a class that is not named."""
    balanced: bool = False
    """Weight all classes equally: a row's weight is rows / (classes * rows of its class), as in scikit-learn."""
    focal_gamma: float = setting(0.0, at_least=0.0)
    """Above 0 the focal loss (Lin et al. 2017, arXiv:1708.02002): rows that the model is sure of count less."""
