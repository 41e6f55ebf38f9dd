"""Reads and writes `baseline.json` in a run directory: the metrics of prompted, untuned models on the run's held-out rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstune.core import files

NAME = "baseline.json"


def remember(run_dir: Path, model: str, split: str, rows: int, prompted: Sequence[dict[str, Any]]) -> None:
    """Add an entry {"model", "split", "rows", "shots", "metrics"} for each of `prompted`, which have `shots` and `metrics`. They
    replace earlier entries of the same model, split and number of examples (`shots`)."""
    new = [{"model": model, "split": split, "rows": rows, **entry} for entry in prompted]
    keys = [(row["model"], row["split"], row["shots"]) for row in new]
    other_rows = [row for row in read(run_dir) if (row.get("model"), row.get("split"), row.get("shots")) not in keys]
    files.write(run_dir / NAME, json.dumps([*other_rows, *new], indent=1))


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of the file; an empty list if it is missing or unreadable."""
    try:
        rows = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
