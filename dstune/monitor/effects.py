"""Effect sizes with 95% intervals: significance only says that there is a difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 1.959964
"""The 97.5% quantile of the normal distribution."""
PSI_ROWS = 500
"""Rows of each side below which the population stability index is refused: without drift it exceeds its usual limit 0.1 in a third
of cases at 200 rows, and hardly ever at 500 (`benchmarks/drift.py psi`)."""
PSI_BINS = 10


@dataclass(frozen=True)
class Effect:
    """An effect size and its 95% interval."""

    name: str
    """`auc`: the chance that a live row has a larger value than a reference row, 0.5 without a difference. `share`: the change of a
    category's share."""
    value: float
    low: float
    high: float
    detail: str = ""

    @property
    def largest(self) -> float:
        """The largest effect in the interval, as the share of rows that would have to move."""
        if self.name == "auc":
            return 2 * max(abs(self.low - 0.5), abs(self.high - 0.5))
        return max(abs(self.low), abs(self.high))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "interval": [self.low, self.high], "detail": self.detail}


def auc(live: np.ndarray, reference: np.ndarray) -> Effect:
    """Return the area under the ROC curve, with an interval by DeLong's variance (Biometrics 44, 1988)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([live, reference]))
    # For each live row, the share of reference rows with a smaller value; for each reference row, of live rows with a larger one.
    share_below = (ranks[: len(live)] - rankdata(live)) / len(reference)
    share_above = 1 - (ranks[len(live) :] - rankdata(reference)) / len(live)
    value = float(share_below.mean())
    variance = _variance(share_below) / len(live) + _variance(share_above) / len(reference)
    half_width = Z * float(np.sqrt(variance))
    return Effect("auc", value, max(0.0, value - half_width), min(1.0, value + half_width))


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def largest_share_change(live: np.ndarray, reference: np.ndarray) -> Effect:
    """Return the change of the category that changed most. The interval does not account for this selection."""
    names = np.unique(np.concatenate([live, reference]))
    shares = [(float(np.mean(live == name)), float(np.mean(reference == name)), str(name)) for name in names]
    live_share, reference_share, name = max(shares, key=lambda entry: (abs(entry[0] - entry[1]), entry[2]))
    return share_change(
        live_share, len(live), reference_share, len(reference), f"{name}: {reference_share:.1%} -> {live_share:.1%}"
    )


def share_change(
    live_share: float, live_rows: int, reference_share: float, reference_rows: int, detail: str = ""
) -> Effect:
    """Return the change of a share, with an interval by Newcombe's method 10 (Statistics in Medicine 17, 1998)."""
    live_low, live_high = _wilson_interval(live_share, live_rows)
    reference_low, reference_high = _wilson_interval(reference_share, reference_rows)
    change = live_share - reference_share
    low = change - float(np.hypot(live_share - live_low, reference_high - reference_share))
    high = change + float(np.hypot(live_high - live_share, reference_share - reference_low))
    return Effect("share", change, low, high, detail)


def _wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of `count` rows."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half_width = Z / (1 + Z**2 / count) * float(np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)))
    return centre - half_width, centre + half_width


def psi(live: np.ndarray, reference: np.ndarray) -> float | None:
    """Return the population stability index over deciles of the reference; None if a side has fewer than PSI_ROWS rows."""
    if min(len(live), len(reference)) < PSI_ROWS:
        return None
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, PSI_BINS + 1)[1:-1]))
    shares = [
        np.maximum(
            np.bincount(np.searchsorted(edges, side, "right"), minlength=len(edges) + 1) / len(side), 0.5 / len(side)
        )
        for side in (live, reference)
    ]
    return float(np.sum((shares[0] - shares[1]) * np.log(shares[0] / shares[1])))
