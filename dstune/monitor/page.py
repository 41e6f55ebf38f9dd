"""The HTML page of a check, in the style of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dstune import __version__
from dstune.core.secrets import redact
from dstune.report.charts import Chart, Line, draw
from dstune.report.html import render
from dstune.report.series import Series

if TYPE_CHECKING:
    from dstune.monitor.command import Outcome

TITLES = {"none": "No drift", "drift": "Drift", "undecided": "Undecided: too few rows"}
EXAMPLE_CHARACTERS = 300


def page(outcome: Outcome, result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML. It contains no texts from a server's logs, since a page has no retention. records: of earlier checks."""
    live = outcome.live
    clusters = [
        entry
        | {
            "examples": [
                (live.rows[number].place, "" if live.from_server else live.rows[number].text[:EXAMPLE_CHARACTERS])
                for number in cluster.examples
            ]
        }
        for entry, cluster in zip(result["clusters"], outcome.check.clusters, strict=True)
    ]
    html = render(
        "monitor.html.j2",
        package="dstune.monitor",
        title=TITLES[outcome.check.verdict],
        result=result,
        against=outcome.reference.name,
        findings=sorted(outcome.check.findings, key=lambda finding: finding.corrected_p),
        clusters=clusters,
        from_server=live.from_server,
        history=_history([*records, result]),
        version=__version__,
        made=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
    )
    return redact(html)


def _history(records: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Return a chart of the smallest corrected p-value of each check; None for the first check."""
    smallest = []
    for record in records:
        entries = record.get("signals")
        values = (
            [entry.get("corrected_p") for entry in entries if isinstance(entry, dict)]
            if isinstance(entries, list)
            else []
        )
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if numbers:
            smallest.append(min(numbers))
    if len(smallest) < 2:
        return None
    series = Series(tuple(range(1, len(smallest) + 1)), tuple(smallest))
    return draw("smallest corrected p", [Line("corrected p", series, 0)], (1, len(smallest)), from_zero=True, tall=True)
