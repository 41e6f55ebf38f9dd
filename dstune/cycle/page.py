"""Write the ledger as an HTML page: versions, their traffic, the gates of the newest candidate, and the decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dstune import __version__
from dstune.core import files
from dstune.core.secrets import redact
from dstune.cycle.ledger import Ledger
from dstune.cycle.registry import Registry
from dstune.grading.verdicts import verdict_of
from dstune.report.charts import Chart, Line, draw
from dstune.report.html import render
from dstune.report.series import Series

PAGE = "report.html"
SHOWN = 200
"""Number of decisions on the page, the newest ones."""
MOST_CHARTS = 6


def write_page(folder: Path, alias: str) -> Path:
    """Write the page of a cycle's folder. It shows no text of any row."""
    registry, lines = Registry.read(folder), Ledger(folder).lines
    judged = [line for line in lines if line["step"] == "judge"]
    html = render(
        "cycle.html.j2",
        package="dstune.cycle",
        title=f"Versions of {alias}",
        registry=registry,
        shares=registry.aliases.get(alias, {}),
        cycles=len({line["cycle"] for line in lines if line["cycle"]}),
        judged=judged[-1] if judged else None,
        charts=_charts(judged),
        lines=lines[::-1][:SHOWN],
        verdict=verdict_of,
        left_out=max(0, len(lines) - SHOWN),
        version=__version__,
        made=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
    )
    files.write(folder / PAGE, redact(html), mode=0o600)
    return folder / PAGE


def _charts(judged: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Draw the candidates' scores on each set that several of them were measured on; slices are in the table."""
    scores: dict[str, dict[int, float]] = {}
    for line in judged:
        for gate in line["gates"]:
            if ": " not in gate["name"]:
                scores.setdefault(gate["name"], {})[line["cycle"]] = gate["candidate"]
    span = (judged[0]["cycle"], judged[-1]["cycle"]) if judged else (0, 0)
    return [
        draw(name, [Line(name, Series(tuple(values), tuple(values.values())), 0)], span)
        for name, values in scores.items()
        if len(values) > 1
    ][:MOST_CHARTS]
