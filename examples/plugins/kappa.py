"""A metric: quadratic weighted kappa (Cohen 1968), for labels whose order means something.

dstune train plugins=[examples/plugins/kappa.py] trainer.early_stopping.metric=kappa trainer.early_stopping.patience=2 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dstune


@dstune.metric
class Kappa(dstune.Metric):
    """Agreement beyond chance, 1 at most; an error counts by the square of its distance."""

    name = "kappa"
    tasks = ("classification", "ordinal")

    def compute(self, predictions: Sequence[Any], targets: Sequence[Any], labels: tuple[str, ...]) -> float:
        import numpy as np

        distances = np.subtract.outer(np.arange(len(labels)), np.arange(len(labels))) ** 2
        observed = np.zeros((len(labels), len(labels)))
        np.add.at(observed, (np.array(targets), np.array(predictions)), 1 / len(targets))
        expected = np.outer(observed.sum(axis=1), observed.sum(axis=0))
        by_chance = (distances * expected).sum()
        return 1.0 - float((distances * observed).sum() / by_chance) if by_chance else 1.0
