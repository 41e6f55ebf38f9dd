"""Compares a model's answers to rows with its answers to the same rows in which some terms are swapped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from dstune.config.schema import RunConfig
from dstune.data.prepared import Split, Swapped
from dstune.protocols import task_of
from dstune.protocols.task_options import ComparesAnswers
from dstune.trainer.measure import Row, rows_of

EvaluatedRows = tuple[Split, Sequence[Row]]
"""Rows, and what the head returned for each of their samples."""


def compare(config: RunConfig, swapped: Swapped, before: EvaluatedRows, after: EvaluatedRows) -> dict[str, Any]:
    """Compare answers over the rows that contain a swapped term; return the measures in total and for each term.

    Measures: how many answers flip, and the mean change of a row's loss per target. A regression has the mean change of the
    prediction instead of flips; a language model has neither. before, after: the unchanged and the swapped rows.
    """
    split, _ = after
    assert split.origins is not None and before[0].origins is not None
    numbers = np.unique(split.origins)
    places = np.searchsorted(np.unique(before[0].origins), swapped.of[numbers])
    losses = _losses(*after) - _losses(*before)[places]
    changes: dict[str, np.ndarray] = {"loss_change": losses}
    if isinstance(task := task_of(config.task), ComparesAnswers):
        changes |= task.counterfactual(config, before, after, places)
    groups: dict[str, list[int]] = defaultdict(list)
    for place, number in enumerate(numbers.tolist()):
        for name in swapped.names[number]:
            groups[name].append(place)
    return _summary(changes, list(range(len(numbers)))) | {
        "by_term": {name: _summary(changes, members) for name, members in sorted(groups.items())}
    }


def _summary(changes: dict[str, np.ndarray], rows: list[int]) -> dict[str, Any]:
    summary: dict[str, Any] = {"rows": len(rows)}
    for name, values in changes.items():
        if name == "flips":
            summary |= {"flips": int(values[rows].sum()), "flip_rate": float(values[rows].mean())}
        else:
            summary |= {name: float(values[rows].mean()), f"{name}_abs": float(np.abs(values[rows]).mean())}
    return summary


def _losses(split: Split, outputs: Sequence[Row]) -> np.ndarray:
    """Return the mean loss of each row's targets, float64 [rows]."""
    return np.array(
        [
            sum(float(chunk["loss"]) for chunk in chunks) / max(sum(float(chunk["weight"]) for chunk in chunks), 1e-9)
            for chunks in rows_of(split, outputs)
        ]
    )


def predictions(split: Split, outputs: Sequence[Row]) -> list[list[Any]]:
    """Return the head's predictions for each row, over all its chunks."""
    return [
        [value for chunk in chunks for value in np.atleast_1d(chunk["prediction"]).tolist()]
        for chunks in rows_of(split, outputs)
    ]


def flips(earlier: Sequence[Any], later: Sequence[Any], places: np.ndarray) -> np.ndarray:
    """Return 1.0 for each answer in `later` that differs from the one at its place in `earlier`, else 0.0: float64 [len(later)]."""
    changed = [earlier[place] != answer for place, answer in zip(places, later, strict=True)]
    return np.array(changed, dtype=np.float64)
