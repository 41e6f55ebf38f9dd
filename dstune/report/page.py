"""Builds the page: selects and orders the content about its runs, and renders the HTML."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from dstune import __version__
from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.secrets import redact
from dstune.report import configuration, curves, data_section, numbers, rollouts, samples
from dstune.report.changed import Changed, changed
from dstune.report.details import Table, details
from dstune.report.html import render
from dstune.report.importance import Importance, importance
from dstune.report.results import Figure, Outcome, figures, outcome, outcomes_table
from dstune.report.run_files import RunFiles, read, section
from dstune.report.series import Series, collect

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class RunView:
    """A run as the templates read it."""

    label: str
    colour: int
    files: RunFiles
    command: str
    """Starts the same run in a shell."""
    outcome: Outcome
    summary: str
    started: str
    hardware: str
    figures: list[Figure]
    sections: list[configuration.Section]
    data: list[data_section.Part]
    confusion: dict[str, Any] | None
    details: list[Table]
    environment: list[tuple[str, str]]
    importance: Importance | None
    changed: Changed | None


def write(runs: Sequence[Path], target: Path) -> None:
    """Write the report of `runs` (directories of runs) to `target` atomically.

    Raises:
        UserError: a `run.yaml` that cannot be read.
        OSError: `target` cannot be written.
    """
    html = redact(of_foreign(lambda: report([read(path) for path in runs]), ", ".join(map(str, runs))))
    files.write(target, html)


def of_foreign(make: Callable[[], str], where: str) -> str:
    """Return a page about files that a stranger may have written. Raises UserError if they contain anything that dstune does not
    write."""
    try:
        return make()
    except (
        OSError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        jinja2.TemplateError,
    ) as error:
        reason = f"its files hold what dstune does not write: {type(error).__name__}: {str(error)[:200]}"
        raise UserError(Problem(where, reason, "give another run")) from error


def report(runs: Sequence[RunFiles]) -> str:
    """Return the HTML of one run, or of several side by side."""
    labels = _labels(runs)
    curves_of = [collect(run.metrics) for run in runs]
    views = [
        _run_view(run, label, position, metrics)
        for position, (run, label, metrics) in enumerate(zip(runs, labels, curves_of, strict=True))
    ]
    charts = curves.charts(runs, curves_of, labels)
    return render(
        "report.html.j2",
        title=labels[0] if len(runs) == 1 else f"{len(runs)} runs",
        runs=views,
        one=views[0] if len(runs) == 1 else None,
        charts=charts,
        results=outcomes_table([run.outcome for run in views]),
        differences=configuration.differences(runs) if len(runs) > 1 else [],
        samples=samples.answered(runs, labels),
        story=rollouts.story(runs[0].path) if len(runs) == 1 else [],
        by_reward=rollouts.by_reward(runs[0].path) if len(runs) == 1 else (0, []),
        version=__version__,
        made=_date(datetime.now(UTC).timestamp()),
    )


def _run_view(run: RunFiles, label: str, position: int, metrics: Mapping[str, Series]) -> RunView:
    return RunView(
        label=label,
        colour=position % curves.COLOURS,
        files=run,
        command=shlex.join(["dstune", "train", *run.overrides]),
        outcome=outcome(run, metrics),
        summary=configuration.one_line(run),
        started=_date(run.launch.get("started")),
        hardware=_hardware(run),
        figures=figures(run, metrics),
        sections=configuration.sections(run),
        data=data_section.parts(run),
        confusion=_confusion(run),
        details=details(run),
        environment=_environment(run),
        importance=importance(run.path),
        changed=changed(run),
    )


def _labels(runs: Sequence[RunFiles]) -> list[str]:
    """Return a unique name for each run: `run.name`, or as much of its path as is needed."""
    for names in ([run.name for run in runs], [run.path.name for run in runs]):
        if len(set(names)) == len(runs):
            return names
    return [str(run.path) for run in runs]


def _date(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)):
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%-d %B %Y, %H:%M UTC")


def _hardware(run: RunFiles) -> str:
    devices = [str(device) for device in run.environment.get("devices") or []]
    hosts = run.environment.get("hosts") or []
    ranks = run.result.get("world_size") or run.launch.get("processes")
    counted = [
        f"{devices.count(name)} {numbers.TIMES} {name}" if devices.count(name) > 1 else name
        for name in dict.fromkeys(devices)
    ]
    facts = [*counted]
    if ranks:
        facts.append(f"{ranks} rank{'s' * (ranks != 1)}")
    if len(hosts) > 1:
        facts.append(f"{len(hosts)} hosts")
    return ", ".join(facts)


def _confusion(run: RunFiles) -> dict[str, Any] | None:
    """Return the confusion matrix of the last evaluation, with shares of each true class; None if there is none."""
    counts = run.result.get("confusion")
    if not counts:
        return None
    labels = run.result.get("labels") or section(run.config, "task").get("labels") or []
    if len(labels) != len(counts):
        labels = [f"class {number}" for number in range(len(counts))]
    rows: list[dict[str, Any]] = []
    for label, row in zip(labels, counts, strict=True):
        total = sum(row)
        cells = [
            {"count": numbers.number(count), "share": count / total if total else 0.0, "right": column == len(rows)}
            for column, count in enumerate(row)
        ]
        recall = row[len(rows)] / total if total else None
        rows.append({"label": label, "cells": cells, "recall": numbers.percent(recall)})
    precision = []
    for column in range(len(counts)):
        predicted = sum(row[column] for row in counts)
        precision.append(numbers.percent(counts[column][column] / predicted if predicted else None))
    return {"labels": labels, "rows": rows, "precision": precision}


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    facts = run.environment
    model = section(facts, "model")
    rows = [
        ("Model", str(model.get("path") or "")),
        ("Revision", str(model.get("revision") or "")),
        ("Parameters", _parameters(model)),
        ("Devices", ", ".join(str(device) for device in facts.get("devices") or [])),
        ("Hosts", ", ".join(str(host) for host in facts.get("hosts") or [])),
        ("Platform", str(facts.get("platform") or "")),
        ("Python", str(facts.get("python") or "")),
        *((name, str(version or "")) for name, version in section(facts, "packages").items()),
        ("Git commit", str(facts.get("git_commit") or "")),
        ("Data fingerprint", str(facts.get("data_fingerprint") or "")),
        *(("Plugin", _plugin(plugin)) for plugin in run.plugins),
        ("Run directory", str(run.path)),
    ]
    return [(name, value) for name, value in rows if value]


def _plugin(plugin: dict[str, Any]) -> str:
    adds = ", ".join(str(text) for text in plugin.get("registers") or [])
    package = f"{plugin['distribution']} {plugin.get('version')}, " if plugin.get("distribution") else ""
    return f"{package}{plugin.get('file')} (sha256 {str(plugin.get('sha256'))[:12]}){': ' if adds else ''}{adds}"


def _parameters(model: dict[str, Any]) -> str:
    total, trained = model.get("parameters"), model.get("trained")
    if not isinstance(total, int) or not isinstance(trained, int):
        return ""
    return f"{numbers.number(total)} ({numbers.number(trained)} trained)"
