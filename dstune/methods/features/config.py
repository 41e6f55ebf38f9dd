"""The keys of `method=features`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dstune.config.fields import setting
from dstune.methods._pooled import Pooling
from dstune.protocols.method import MethodConfig


@dataclass(frozen=True)
class FeaturesConfig(MethodConfig):
    """The frozen body reads every row once; a classifier is trained on the cached features.

    Use it for many epochs, for many variants of a classifier, or without a GPU: the body does not run after the first epoch.
    Optionally, scikit-learn fits a logistic regression and a random forest on the same features; the forest ranks the features
    by impurity (Breiman 2001). The export is like that of `method=head`.
    """

    needs: ClassVar[str] = "task=classification"
    name: str = "features"
    pooling: Pooling = Pooling.mean
    """What the classifier reads: `cls` the first token's state, `mean` of all, `last` token's."""
    layers: int = setting(0, at_least=0)
    """Dense layers between pooling and classes."""
    dropout: float = setting(0.0, at_least=0.0, below=1.0)
    """Dropout in front of each layer of the classifier."""
    logistic_regression: bool = False
    """Fit scikit-learn's logistic regression on the same features too, and report it."""
    random_forest: bool = False
    """Fit a random forest on the same features too, and report it with its ranking of the features by impurity."""
    trees: int = setting(200, at_least=1)
    """Trees of the random forest."""
