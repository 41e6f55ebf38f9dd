"""A callback with state and a veto: leaves out the update of a step whose loss is far above the running mean.

dstune train plugins=[examples/plugins/veto_outliers.py] 'trainer.callbacks=[{veto_outliers: {factor: 2.0}}]' ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dstune


@dstune.callback
class VetoOutliers(dstune.Callback):
    """Every rank sees the same loss of the global batch, so every rank decides alike."""

    name = "veto_outliers"

    def __init__(self, factor: float = 3.0, decay: float = 0.9, at_least: int = 3):
        """factor: of the running mean, above which a loss is an outlier. decay: of that mean. at_least: losses before the
        first veto."""
        if factor <= 1.0:
            raise ValueError("factor must be above 1: every loss would be an outlier")
        self.factor, self.decay, self.at_least = factor, decay, at_least
        self.mean, self.losses, self.vetoed = 0.0, 0, 0

    def veto(self, run: Any, loss: float) -> bool:
        outlier = self.losses >= self.at_least and loss > self.factor * self.mean
        if outlier:
            self.vetoed += 1
        else:
            share = self.decay if self.losses else 0.0
            self.mean = share * self.mean + (1 - share) * loss
            self.losses += 1
        return outlier

    def metrics(self, run: Any, step: Any) -> Mapping[str, float | int | str]:
        return {"veto_outliers/mean": self.mean, "veto_outliers/vetoed": self.vetoed}

    def results(self) -> Mapping[str, Any]:
        return {"veto_outliers": self.vetoed}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "losses": self.losses, "vetoed": self.vetoed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.losses, self.vetoed = state["mean"], state["losses"], state["vetoed"]
