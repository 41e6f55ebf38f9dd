"""Shows the results of `method=importance`: tensors by score, and their ranks by gradients compared with those by ablation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core.parsing import parse_json, read_file
from dstune.report.numbers import number, percent

MAX_TENSORS = 15
"""Tensors in the table; all are in importance.json."""


@dataclass(frozen=True)
class Importance:
    lead: str
    columns: list[str]
    rows: list[list[str]]
    correlations: list[tuple[str, str]]
    """Score, and its rank correlation with ablation."""
    dots: list[tuple[float, float, str]]
    """Of each tensor: its rank by the score from the left and by ablation from the bottom, per cent, and its name."""


def importance(run_dir: Path) -> Importance | None:
    """Return the section of a run; None if it has no complete importance.json."""
    try:
        return _section(parse_json(read_file(run_dir / "importance.json")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _section(report: dict[str, Any]) -> Importance:
    selection, tensors = report["selection"], report["tensors"]
    ablated = bool(report["correlation"])
    columns = ["tensor", "shape", selection.replace("_", " "), "trained"] + (["loss without it"] if ablated else [])
    rows = []
    for row in tensors[:MAX_TENSORS]:
        size = 1
        for length in row["shape"]:
            size *= length
        shape = " x ".join(map(str, row["shape"]))
        cells = [row["name"], shape, number(row["scores"][selection]), percent(row["trained"] / size)]
        rows.append(cells + ([f"{row['lost']['loss']:+.4f}"] if ablated else []))
    unit = "entries" if report["unit"] == "entries" else "whole tensors"
    lead = (
        f"{percent(report['trained_share'])} of the pretrained weights are trained, {unit} chosen by "
        f"{selection.replace('_', ' ')} over {report['steps']} steps."
    )
    against = selection if selection in report["correlation"] else "gradient_weight"
    return Importance(
        lead=lead,
        columns=columns,
        rows=rows,
        correlations=[
            (name.replace("_", " "), f"{correlation['spearman']:+.2f}")
            for name, correlation in report["correlation"].items()
        ],
        dots=_dots(tensors, against) if ablated else [],
    )


def _dots(tensors: list[dict[str, Any]], score: str) -> list[tuple[float, float, str]]:
    across = sorted(range(len(tensors)), key=lambda index: tensors[index]["scores"][score])
    up = sorted(range(len(tensors)), key=lambda index: tensors[index]["lost"]["loss"])
    last = max(1, len(tensors) - 1)
    across_place, up_place = (
        {index: 100 * place / last for place, index in enumerate(order)} for order in (across, up)
    )
    return [
        (round(across_place[index], 2), round(100 - up_place[index], 2), tensors[index]["name"])
        for index in range(len(tensors))
    ]
