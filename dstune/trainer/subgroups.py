"""Measures metrics of subgroups, rows that share a value of a column: the worst subgroup, and its gap to the best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data.prepared import Split
from dstune.metrics import is_lower_better
from dstune.protocols import task_of
from dstune.trainer.measure import Row, Totals, count_rows, with_registered

NO_VALUE = "(none)"

MOST_VALUES = 200
"""Most values of a column: with more, it identifies single rows rather than groups."""


def measure_slices(
    config: RunConfig, labels: tuple[str, ...], split: Split, outputs: Sequence[Row]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure for each column of `evaluate.slices` the metrics `slice_worst/COLUMN` and `slice_gap/COLUMN`, and as details the
    metrics of each value. Raises UserError for a column that no row has, or that has too many values."""
    assert split.origins is not None and split.texts is not None, "the split has no texts of its rows"
    texts = split.texts.select_columns(["slices"])[:]["slices"]
    values = [json.loads(texts[number]) for number in split.origins]
    task = task_of(config.task)
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}
    for column in config.evaluate.slices:
        slice_names = np.array([row[column] or NO_VALUE for row in values], dtype=object)
        names = sorted(set(slice_names.tolist()))
        if names == [NO_VALUE]:
            reason = f"no {split.name} row has a column of this name with a single value"
            raise UserError(Problem("evaluate.slices", reason, "name columns of the rows", column))
        if len(names) > MOST_VALUES:
            reason = f"the column has {len(names)} different values, and {MOST_VALUES} are the most"
            raise UserError(Problem("evaluate.slices", reason, "a column that groups the rows", column))
        slices = {}
        for name in names:
            samples = np.flatnonzero(slice_names == name)
            rows = [outputs[sample] for sample in samples.tolist()]
            part = split.select(samples)
            evaluation = task.measure(labels, part, totals_of(rows), rows)
            evaluation = with_registered(evaluation, task, labels)
            slices[name] = evaluation.metrics | {"rows": count_rows(part, config.task)}
        metric = config.evaluate.slice_metric or task.slice_metric(slices[names[0]])
        large = {
            name: metrics_of_slice[metric]
            for name, metrics_of_slice in slices.items()
            if metrics_of_slice["rows"] >= config.evaluate.min_slice_rows and metric in metrics_of_slice
        }
        details[column] = {"metric": metric, "values": slices, "worst": None, "gap": None}
        if large:
            lower = is_lower_better(metric)
            worst = (max if lower else min)(large, key=large.__getitem__)
            gap = max(large.values()) - min(large.values())
            details[column] |= {"worst": worst, "gap": gap}
            metrics |= {f"slice_worst/{column}": large[worst], f"slice_gap/{column}": gap}
    return metrics, details


def totals_of(rows: Sequence[Row]) -> Totals:
    """Return the totals over `rows`, the head's values of some samples."""
    loss, weight, correct = (float(sum(float(row[name]) for row in rows)) for name in ("loss", "weight", "correct"))
    return Totals(loss, weight, correct)
