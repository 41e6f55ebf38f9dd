"""Builds the page of a sweep: trials ranked by objective, the effect of each key, learning curves, and cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from dstune import __version__
from dstune.config.convert import format_value
from dstune.core import files
from dstune.core.parsing import parse_yaml, read_file
from dstune.core.secrets import redact
from dstune.report.best_trial import best_commands
from dstune.report.charts import Chart, Line, draw
from dstune.report.curves import COLOURS, title_of
from dstune.report.effects import are_numbers, is_logarithmic, shares
from dstune.report.html import render
from dstune.report.numbers import THIN_SPACE, duration, log_ticks, number, percent, short, tick_label, ticks
from dstune.report.page import of_foreign
from dstune.report.results import Figure, plain_name
from dstune.report.run_files import RUN_FILE, RunFiles, read, section
from dstune.report.series import Series, collect, smoothed, smoothing_span
from dstune.tracking.trials import (
    FINISHED,
    SWEEP_FILE,
    Record,
    less_is_better,
    logarithmic_keys,
    objectives_of,
    ranked,
    read_records,
    unbeaten,
    with_outcome,
)

MOST_MARKS = 6
"""A key with at most this many values has a tick for each of them."""
OUTLIER_DISTANCES = 4.0
"""Interquartile ranges beyond a quartile from which a trial's objective counts as diverged."""


@dataclass(frozen=True)
class Trial:
    """A trial and its rank."""

    record: Record
    place: int
    """Its rank by the first objective: 0 for the best."""
    run: RunFiles | None
    """None if it never wrote a `run.yaml`."""
    curves: Mapping[str, Series]
    is_unbeaten: bool
    """Whether a sweep has several objectives and no other trial beats this one in all of them."""

    @property
    def is_coloured(self) -> bool:
        return self.place < COLOURS

    @property
    def short(self) -> str:
        return short_name(self.record)

    def value(self, objective: str) -> float | None:
        return self.record.objective.get(objective)


def short_name(record: Record) -> str:
    """Return the number that begins a trial's name, or else the name: the values in it have columns of their own."""
    trial_number, _, values_text = record.name.partition("-")
    return trial_number if trial_number.isdigit() and values_text else record.name


@dataclass(frozen=True)
class Scale:
    """An axis of a plot."""

    ticks: list[tuple[float, str]]
    """Position in percent, and label, of each tick."""
    names: Sequence[str] = ()
    """The values of an axis of texts; empty for numbers between `low` and `high`."""
    low: float = 0.0
    high: float = 1.0
    logarithmic: bool = False

    def position(self, value: Any) -> float:
        """Return where a value lies on the axis, in percent; a number outside of it lies at its end."""
        if self.names:
            count = len(self.names)
            return 50.0 if count == 1 else 8 + 84 * self.names.index(format_value(value)) / (count - 1)
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return round(100 * (value - low) / (high - low), 2)


def scale(values: Sequence[Any], *, of_key: bool = False, logarithmic: bool = False) -> Scale:
    """Return an axis that shows `values`: logarithmic if they span orders of magnitude, evenly spaced if they are texts.

    of_key: whether the values are those of a key, so that a few of them get ticks of their own. logarithmic: whether the sweep
    searched the key on a logarithmic scale.
    """
    if not are_numbers(values):
        names = sorted({format_value(value) for value in values})
        axis = Scale([], names=names)
        return replace(axis, ticks=[(axis.position(name), name) for name in names])
    low, high = float(min(values)), float(max(values))
    if is_logarithmic(values) or (logarithmic and low > 0 and low < high):
        low, high = low / 1.25, high * 1.25
        axis = Scale([], low=low, high=high, logarithmic=True)
        marks = [(axis.position(value), number(value, 2)) for value in log_ticks(low, high)]
    else:
        margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
        axis = Scale([], low=low, high=high)
        tick_values = ticks(low, high, 4)
        step = tick_values[1] - tick_values[0] if len(tick_values) > 1 else abs(tick_values[0])
        marks = [(axis.position(value), tick_label(value, step)) for value in tick_values]
    if of_key and len(set(values)) <= MOST_MARKS:
        marks = [(axis.position(value), _value(value)) for value in sorted(set(values))]
    return replace(axis, ticks=marks)


def without_outliers(values: Sequence[float], lower: bool) -> tuple[list[float], int]:
    """Return the objectives that an axis shows, and the number of diverged trials that it leaves out.

    A diverged trial is more than OUTLIER_DISTANCES interquartile ranges beyond the worse quartile: an axis that included it would
    press all others into one line. lower: whether a smaller value is better.
    """
    ordered = sorted(values)
    first, third = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    margin = OUTLIER_DISTANCES * (third - first)
    inside = [
        value for value in values if margin == 0 or (value <= third + margin if lower else value >= first - margin)
    ]
    return inside, len(values) - len(inside)


def write(sweep: Path, target: Path) -> None:
    """Write the page of the sweep at `sweep` to `target`, complete or not at all. Raises OSError, UserError."""
    html = redact(of_foreign(lambda: page(sweep), str(sweep)))
    files.write(target, html)


def page(sweep: Path) -> str:
    """Return the HTML page of the sweep at `sweep`."""
    objectives = objectives_of(sweep)
    runs = {record.name: _run(sweep, record) for record in read_records(sweep)}
    records = [_with_outcome(record, runs[record.name], objectives) for record in read_records(sweep)]
    ranked_records = ranked(records, objectives[0])
    front = unbeaten(ranked_records, objectives) if len(objectives) > 1 else set()
    trials = [
        _trial(record, runs[record.name], place, record.name in front) for place, record in enumerate(ranked_records)
    ]
    placed = [trial for trial in trials if trial.value(objectives[0]) is not None]
    keys = list(dict.fromkeys(key for record in ranked_records for key in record.values))
    logarithmic = logarithmic_keys(sweep)
    judged = [trial for trial in placed if trial.record.status in ("completed", "stopped")]
    return render(
        "sweep.html.j2",
        title=_title(sweep),
        sweep=str(sweep),
        trials=trials,
        table=_table(trials, objectives, keys),
        figures=_figures(trials, objectives[0]),
        objective=plain_name(objectives[0]),
        lower=less_is_better(objectives[0]),
        objectives=objectives,
        scatters=_scatters(placed, objectives, keys, logarithmic),
        parallel=_parallel(placed, objectives[0], keys, logarithmic),
        commands=best_commands(sweep, ranked_records, objectives[0]),
        effects=[
            (key, round(100 * share, 1), f"{100 * share:.0f}{THIN_SPACE}%")
            for key, share in shares(
                [trial.record.values for trial in judged], [trial.record.objective[objectives[0]] for trial in judged]
            ).items()
        ],
        judged=len(judged),
        charts=_charts(trials, objectives),
        failed=[trial for trial in trials if trial.record.status == "failed"],
        version=__version__,
        made=datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC"),
    )


def _title(sweep: Path) -> str:
    """Return `run.name` of the sweep, or its path if `sweep.yaml` does not state the name."""
    try:
        name = parse_yaml(read_file(sweep / SWEEP_FILE).decode())["config"]["run"]["name"]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        name = None
    return name if isinstance(name, str) and name else f"{sweep.absolute().parent.name}/{sweep.name}"


def _run(sweep: Path, record: Record) -> RunFiles | None:
    path = sweep / record.name
    return read(path) if (path / RUN_FILE).is_file() else None


def _with_outcome(record: Record, run: RunFiles | None, objectives: Sequence[str]) -> Record:
    if run is None:
        return record
    exports_best = section(run.config, "run").get("export") == "best"
    return with_outcome(record, run.result, run.metrics, objectives, exports_best)


def _trial(record: Record, run: RunFiles | None, place: int, is_unbeaten: bool) -> Trial:
    return Trial(record, place, run, collect(run.metrics) if run else {}, is_unbeaten)


def _table(trials: Sequence[Trial], objectives: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    heading = [*((plain_name(name), True) for name in objectives), *((key, False) for key in keys)]
    heading += [("steps", True), ("tokens", True), ("time", True), ("starts", True)]
    rows = []
    for trial in trials:
        record, result = trial.record, trial.run.result if trial.run else {}
        cells = [number(record.objective.get(name)) for name in objectives]
        cells += [_value(record.values.get(key)) for key in keys]
        cells += [number(_steps(trial)), short(result.get("tokens")), duration(record.seconds), str(record.starts)]
        rows.append({"trial": trial, "cells": cells})
    return {"heading": heading, "rows": rows}


def _value(value: Any) -> str:
    if not isinstance(value, float):
        return format_value(value)
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _steps(trial: Trial) -> float | None:
    loss = trial.curves.get("loss")
    result = trial.run.result if trial.run else {}
    steps = result.get("steps")
    return steps if isinstance(steps, int) else loss.steps[-1] if loss else None


def _figures(trials: Sequence[Trial], objective: str) -> list[Figure]:
    records = [trial.record for trial in trials]
    counts = {
        name: sum(record.status == name for record in records)
        for name in dict.fromkeys(record.status for record in records)
    }
    best = next((record for record in records if record.objective and record.status in FINISHED), None)
    figures = [Figure("trials", str(len(records)), ", ".join(f"{count} {name}" for name, count in counts.items()))]
    if best is not None:
        figures.append(
            Figure(f"best {plain_name(objective)}", number(best.objective.get(objective)), f"trial {short_name(best)}")
        )
    values = [value for trial in trials if (value := trial.value(objective)) is not None]
    if len(values) > 1:
        worst = max(values) if less_is_better(objective) else min(values)
        figures.append(Figure("worst", number(worst), "of those with an evaluation"))
    figures.append(Figure("time", duration(sum(record.seconds for record in records)), "of all trials together"))
    done, planned = _steps_done_and_planned(trials)
    if planned > done:
        figures.append(
            Figure("steps", f"{done:,}", f"of {planned:,}: {percent(1 - done / planned)} never trained", good=True)
        )
    tokens = sum(trial.run.result.get("tokens") or 0 for trial in trials if trial.run)
    if tokens:
        figures.append(Figure("tokens", short(tokens)))
    return figures


def _steps_done_and_planned(trials: Sequence[Trial]) -> tuple[int, int]:
    """Return the steps that finished trials made, and the steps that they would have made without pruning."""
    done = planned = 0
    for trial in trials:
        steps = _steps(trial)
        if trial.record.status not in FINISHED or steps is None or trial.run is None:
            continue
        planned_steps = section(trial.run.config, "trainer").get("max_steps")
        done += int(steps)
        planned += max(
            int(steps), planned_steps if trial.record.status == "pruned" and isinstance(planned_steps, int) else 0
        )
    return done, planned


def _scatters(
    trials: Sequence[Trial], objectives: Sequence[str], keys: Sequence[str], logarithmic: Collection[str]
) -> list[dict[str, Any]]:
    """Return a plot of the objective over each key that varies, and first, if there are two objectives, of one over the other."""
    if len(trials) < 2:
        return []
    plots = [(key, [trial.record.values.get(key) for trial in trials], trials) for key in keys]
    if len(objectives) > 1:
        complete = [trial for trial in trials if trial.value(objectives[1]) is not None]
        plots.insert(0, (plain_name(objectives[1]), [trial.value(objectives[1]) for trial in complete], complete))
    return [
        _scatter(
            title, scale(values, of_key=title in keys, logarithmic=title in logarithmic), values, plotted, objectives[0]
        )
        for title, values, plotted in plots
        if len({format_value(value) for value in values}) > 1
    ]


def _scatter(
    title: str, across: Scale, values: Sequence[Any], trials: Sequence[Trial], objective: str
) -> dict[str, Any]:
    """Return a plot with a dot for each trial. values: of the horizontal axis `across`, one for each trial."""
    inside, outside = without_outliers(_objective_values(trials, objective), less_is_better(objective))
    up = scale(inside)
    dots = [
        {
            "x": across.position(value),
            "y": round(100 - up.position(trial.value(objective)), 2),
            "trial": trial,
            "text": f"{trial.record.name}: {number(trial.value(objective))}",
        }
        for value, trial in zip(values, trials, strict=True)
    ]
    notes = ["logarithmic" * across.logarithmic, f"{outside} beyond the edge" * bool(outside)]
    return {
        "title": title,
        "note": ", ".join(filter(None, notes)),
        "dots": dots,
        "x_ticks": across.ticks,
        "x_names": len(across.names),
        "y_ticks": [(round(100 - at, 2), label) for at, label in up.ticks],
    }


def _objective_values(trials: Sequence[Trial], objective: str) -> list[float]:
    return [value for trial in trials if (value := trial.value(objective)) is not None]


def _parallel(
    trials: Sequence[Trial], objective: str, keys: Sequence[str], logarithmic: Collection[str]
) -> dict[str, Any] | None:
    """Return a parallel-coordinates plot: a line for each trial through its values to its objective. None with fewer than two keys
    that vary, or fewer than three trials."""
    varied = [key for key in keys if len({format_value(trial.record.values.get(key)) for trial in trials}) > 1]
    if len(varied) < 2 or len(trials) < 3:
        return None
    columns: list[tuple[str, list[Any]]] = [(key, [trial.record.values.get(key) for trial in trials]) for key in varied]
    scales = [scale(values, of_key=True, logarithmic=key in logarithmic) for key, values in columns]
    objective_values = _objective_values(trials, objective)
    columns.append((plain_name(objective), objective_values))
    scales.append(scale(without_outliers(objective_values, less_is_better(objective))[0]))
    lefts = [round(100 * column / (len(columns) - 1), 2) for column in range(len(columns))]
    lines = []
    for row, trial in enumerate(trials):
        heights = [
            100 - column_scale.position(values[row]) for column_scale, (_, values) in zip(scales, columns, strict=True)
        ]
        path = "".join(f"{'L' if x else 'M'}{10 * x:.1f} {10 * y:.1f}" for x, y in zip(lefts, heights, strict=True))
        lines.append({"path": path, "trial": trial})
    axes = [
        {"x": x, "name": name, "ticks": [(round(100 - tick, 2), label) for tick, label in column_scale.ticks]}
        for x, (name, _), column_scale in zip(lefts, columns, scales, strict=True)
    ]
    return {"axes": axes, "lines": lines[::-1]}


def _charts(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Chart]:
    """Draw a chart of each metric with the curves of all trials: the best trials in colour, the others behind them."""
    charts: list[Chart] = []
    for metric in dict.fromkeys([*(f"eval/{name}" for name in objectives), "loss", "eval/loss"]):
        measured = [trial for trial in trials if metric in trial.curves]
        if measured:
            charts.append(_chart(metric, measured, tall=not charts))
    return charts


def _chart(metric: str, trials: Sequence[Trial], *, tall: bool) -> Chart:
    """Draw the curves of one metric. trials: those that have measured it."""
    # A trial counts as diverged only by comparison with others that have ended: one on its way may still come down.
    last_by_name = {
        trial.record.name: last
        for trial in trials
        if trial.record.status in ("completed", "stopped") and (last := trial.curves[metric].last) is not None
    }
    inside, diverged = without_outliers(list(last_by_name.values()), less_is_better(metric.removeprefix("eval/")))
    drawn = [trial for trial in trials if last_by_name.get(trial.record.name) in (None, *inside)]
    window = smoothing_span(max(len(trial.curves[metric].steps) for trial in drawn)) if metric == "loss" else 0
    lines = [
        Line(
            trial.record.name,
            smoothed(trial.curves[metric], window) if window else trial.curves[metric],
            trial.place,
            faint=not trial.is_coloured,
        )
        for trial in reversed(drawn)
    ]
    steps = [line.series.steps[end] for line in lines for end in (0, -1)]
    notes = [f"smoothed over {window} steps" * bool(window), f"{diverged} diverged, not drawn" * bool(diverged)]
    note = ", ".join(filter(None, notes))
    return draw(title_of(metric), lines, (min(steps), max(steps)), metric=metric, note=note, tall=tall)
