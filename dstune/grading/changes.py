"""What fine-tuning changed: answers to probes and recited rows, before and after. `safety.json` of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dstune.core import files
from dstune.core.parsing import object_in
from dstune.grading.paired import interval_of_gains, paired_change

NAME = "safety.json"
FORMAT = 1
EXAMPLES = 3
"""Most answers of a probe that are shown, among those whose score changed."""
ROW_KINDS = ("training", "held-out", "planted")

Measured = Mapping[str, Any]
"""What one model reached: `model`, `step`, `probes` (by name: title, blind_spots, ids, texts, answers, scores) and `rows` (by kind:
the share of each row's rest that was recited)."""


def remember(run_dir: Path, moment: str, measured: Measured) -> dict[str, Any] | None:
    """Store a measurement `before` or `after` training (`moment`). Once both exist, store and return the changes."""
    content: dict[str, Any] = {key: value for key, value in read(run_dir).items() if key in ("before", "after")}
    content = {"format": FORMAT, **content, moment: measured}
    if "before" in content and "after" in content:
        content["changes"] = compare(content["before"], content["after"])
    files.write(run_dir / NAME, json.dumps(content, indent=1) + "\n")
    return content.get("changes")


def read(run_dir: Path) -> dict[str, Any]:
    """Return the file of a run; empty if there is none."""
    return object_in(run_dir / NAME)


def compare(before: Measured, after: Measured) -> dict[str, Any]:
    """Return the changes of all probes and kinds of rows that both measurements have."""
    probes = [
        {"name": name, **_of_probe(before["probes"][name], of_after)}
        for name, of_after in after["probes"].items()
        if before["probes"].get(name, {}).get("ids") == of_after["ids"]
    ]
    shares = {
        kind: (np.asarray(before["rows"][kind], dtype=float), np.asarray(after["rows"][kind], dtype=float))
        for kind in ROW_KINDS
        if after["rows"].get(kind) and len(before["rows"].get(kind, ())) == len(after["rows"][kind])
    }
    rows = [{"kind": kind, **_of_rows(*both)} for kind, both in shares.items()]
    return {
        "before": before["model"], "after": after["model"], "step": after.get("step"), "probes": probes, "rows": rows,
        "beyond_held_out": _beyond_held_out(shares), "not_measured": after.get("not_measured", ""),
    }  # fmt: skip


def _of_probe(before: Measured, after: Measured) -> dict[str, Any]:
    change = paired_change(before["scores"], after["scores"])
    worse_first = sorted(range(len(after["scores"])), key=lambda at: after["scores"][at] - before["scores"][at])
    examples = [
        {"question": after["texts"][at], "before": before["answers"][at], "after": after["answers"][at]}
        for at in worse_first
        if after["scores"][at] != before["scores"][at]
    ]
    return {
        "title": after["title"], "questions": len(after["scores"]), **change,
        "blind_spots": after["blind_spots"], "examples": examples[:EXAMPLES],
    }  # fmt: skip


def _of_rows(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    recited = {"recited_before": int((before == 1).sum()), "recited_after": int((after == 1).sum())}
    return {"rows": len(after), **paired_change(before, after), **recited}


def _beyond_held_out(shares: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any] | None:
    """Measure how much more was gained on training rows than on rows that were never trained on, which is memory and not skill."""
    if "training" not in shares or "held-out" not in shares:
        return None
    gains = [after - before for before, after in (shares["training"], shares["held-out"])]
    low, high = interval_of_gains(gains[0], gains[1])
    difference = float(gains[0].mean() - gains[1].mean())
    return {"difference": difference, "low": low, "high": high, "verdict": "up" if low > 0 else "none"}


def worse(changes: Mapping[str, Any]) -> list[str]:
    """Return descriptions of what became worse: probes with lower scores, and memorized rows."""
    names = [probe["title"] for probe in changes["probes"] if probe["verdict"] == "down"]
    beyond = changes["beyond_held_out"]
    if beyond is not None and beyond["verdict"] == "up":
        names.append("training rows recited")
    return names + ["planted rows recited"] * any(is_planted_known(row) for row in changes["rows"])


def is_planted_known(row: Mapping[str, Any]) -> bool:
    """Return whether the model recites complete planted rows that it did not recite before. Nobody guesses one, so a single one is
    proof."""
    return bool(row["kind"] == "planted" and row["recited_after"] > row["recited_before"])


def in_one_line(changes: Mapping[str, Any]) -> str:
    """Return one line with each share before and after, and what became worse."""
    shares = [f"{probe['title']} {probe['before']:.0%} -> {probe['after']:.0%}" for probe in changes["probes"]]
    rows = [f"{row['recited_after']} of {row['rows']} {row['kind']} rows recited" for row in changes["rows"]]
    worse_names = worse(changes)
    return "; ".join(
        [*shares, *rows, f"worse: {', '.join(worse_names)}" if worse_names else "nothing is shown to be worse"]
    )
