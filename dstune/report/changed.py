"""Shows what fine-tuning changed: answers to probes and recited rows before and after, from a run's `safety.json`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dstune.grading import changes
from dstune.protocols import TASKS
from dstune.report.numbers import MINUS, percent
from dstune.report.run_files import RunFiles, section

ROW_TITLES = {
    "training": "training rows: share of the rest recited",
    "held-out": "held-out rows: the same",
    "planted": "planted rows: the same",
}
BEYOND = "more on training rows than on held-out rows"


@dataclass(frozen=True)
class Line:
    """One measure, as text."""

    title: str
    before: str
    after: str
    difference: str
    verdict: str
    is_good: bool | None = None
    """Whether the verdict is an improvement; None without a verdict."""
    remark: str = ""


@dataclass(frozen=True)
class Example:
    question: str
    before: str
    after: str


@dataclass(frozen=True)
class Changed:
    """The section of one run. Without `lines`, `command` says how to measure them."""

    lines: list[Line]
    examples: list[tuple[str, list[Example]]]
    """Title of a probe and answers whose score changed."""
    blind_spots: list[tuple[str, str]]
    against: str = ""
    note: str = ""
    command: str = ""


def changed(run: RunFiles) -> Changed | None:
    """Return the section, or None for a model that answers no questions."""
    changes_of_run = changes.read(run.path).get("changes")
    if changes_of_run is None:
        return _unmeasured(run)
    try:
        return _section(changes_of_run)
    except (TypeError, LookupError, ValueError, AttributeError):  # a stranger's file may contain anything
        return None


def _unmeasured(run: RunFiles) -> Changed | None:
    task = TASKS.classes().get(str(section(run.config, "task").get("name")))
    if task is None or not task.generates or task.asks_by_prompt:
        return None
    return Changed([], [], [], command=f"dstune evaluate {shlex.quote(str(run.path))} --safety")


def _section(changes_of_run: Mapping[str, Any]) -> Changed:
    probes, rows, beyond = changes_of_run["probes"], changes_of_run["rows"], changes_of_run["beyond_held_out"]
    lines = [
        _line(str(probe["title"]), probe, f"{probe['questions']} questions", down="worse", up="better")
        for probe in probes
    ]
    for row in rows:
        remark = f"{row['recited_before']} to {row['recited_after']} of {row['rows']} rests recited whole"
        line = _line(ROW_TITLES[row["kind"]], row, remark)
        lines.append(replace(line, verdict="memorised", is_good=False) if changes.is_planted_known(row) else line)
    if beyond is not None:
        verdict = "memorised" if beyond["verdict"] == "up" else ""
        lines.append(Line(BEYOND, "", "", _interval(beyond), verdict, False if verdict else None))
    return Changed(
        lines,
        [
            (
                str(probe["title"]),
                [Example(*(str(example[key]) for key in ("question", "before", "after"))) for example in examples],
            )
            for probe in probes
            if (examples := probe["examples"])
        ],
        [(str(probe["title"]), str(probe["blind_spots"])) for probe in probes],
        against=str(changes_of_run["before"]),
        note=str(changes_of_run["not_measured"]),
    )


def _line(title: str, change: Mapping[str, Any], remark: str, *, down: str = "", up: str = "") -> Line:
    verdict = {"down": down, "up": up}.get(change["verdict"], "")
    is_good = verdict == "better" if verdict else None
    before, after = percent(change["before"]), percent(change["after"])
    return Line(title, before, after, _interval(change), verdict, is_good, remark)


def _interval(change: Mapping[str, Any]) -> str:
    return f"{_signed(change['difference'])} ({_signed(change['low'])} to {_signed(change['high'])})"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", MINUS)
