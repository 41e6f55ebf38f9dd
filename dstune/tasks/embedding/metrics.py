"""Metrics of embeddings: how well each anchor finds its positive among all texts of the split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DEPTHS = (1, 5, 10)
ANCHORS_AT_ONCE = 1024
"""Anchors that are compared at a time: their similarities to 100,000 candidates take 400 MB."""


def embedding_metrics(rows: Sequence[dict[str, Any]], temperature: float) -> dict[str, float]:
    """Return mean InfoNCE loss, recall at 1, 5 and 10, and the mean reciprocal rank (MRR).

    Candidates of an anchor are the positives and negatives of all rows, each text once, without the anchor's other positives. A
    candidate that is as similar as the positive counts as more similar, so that identical vectors score nothing.
    """
    anchors = np.stack([row["anchor"] for row in rows]).astype(np.float64)
    positives = np.stack([row["positive"] for row in rows]).astype(np.float64)
    negatives = np.concatenate([row["negative"] for row in rows]).astype(np.float64)
    anchor_keys, positive_keys = (np.array([int(row[name]) for row in rows]) for name in ("anchor_key", "positive_key"))
    negative_keys = np.concatenate([row["negative_key"] for row in rows]).astype(np.int64)
    keys, first = np.unique(np.concatenate([positive_keys, negative_keys]), return_index=True)
    candidates = np.concatenate([positives, negatives.reshape(-1, positives.shape[1])])[first]
    positive_places = np.searchsorted(keys, positive_keys)
    positives_of_anchor: dict[int, set[int]] = {}
    for key, position in zip(anchor_keys.tolist(), positive_places.tolist(), strict=True):
        positives_of_anchor.setdefault(key, set()).add(position)
    ranks, losses = [], []
    for start in range(0, len(rows), ANCHORS_AT_ONCE):
        chosen = np.arange(start, min(start + ANCHORS_AT_ONCE, len(rows)))
        similarities = anchors[chosen] @ candidates.T
        positive_scores = similarities[np.arange(len(chosen)), positive_places[chosen]].copy()
        for number, row in enumerate(chosen):
            similarities[
                number, list(positives_of_anchor[int(anchor_keys[row])] - {int(positive_places[row])})
            ] = -np.inf
        ranks.append((similarities >= positive_scores[:, None]).sum(axis=1))  # the positive itself is one of them
        scores = similarities / temperature
        highest = scores.max(axis=1)
        losses.append(highest + np.log(np.exp(scores - highest[:, None]).sum(axis=1)) - positive_scores / temperature)
    rank = np.concatenate(ranks)
    return {
        "loss": float(np.concatenate(losses).mean()),
        **{f"recall_at_{depth}": float((rank <= depth).mean()) for depth in DEPTHS},
        "mrr": float((1 / rank).mean()),
        "targets": float(len(rows)),
    }
