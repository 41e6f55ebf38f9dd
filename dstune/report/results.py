"""The figures of a run: its results and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dstune.core import baseline_file
from dstune.metrics import is_lower_better
from dstune.report.numbers import MINUS, NONE, duration, number, short
from dstune.report.run_files import RunFiles, section
from dstune.report.series import Series
from dstune.tracking.console import FEW_ROWS

Curves = Mapping[str, Series]

NAMES = {
    "loss": "held-out loss",
    "gap": "gap to training",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "f1_macro": "F1 macro",
    "f1_micro": "F1 micro",
    "f1": "F1",
    "exact_match": "exact match",
    "entity_f1": "entity F1",
    "mcc": "MCC",
    "auroc": "AUROC",
    "bits_per_byte": "bits per byte",
    "chrf": "chrF",
    "bleu": "BLEU",
    "ter": "TER",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def plain_name(metric: str) -> str:
    """Return the usual name of a metric, for readers."""
    return NAMES.get(metric) or metric.replace("_", " ")


COUNTS = ("targets", "generated", "rows", "tokens", "seconds")


@dataclass(frozen=True)
class Figure:
    """One number under the headline."""

    label: str
    value: str
    detail: str = ""
    good: bool | None = None
    """Whether the change in `detail` is one for the better; None where it is neither."""


@dataclass(frozen=True)
class Outcome:
    """A run's results as numbers, for the table of several runs."""

    status: str
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of each held-out metric by its name; `training loss` where nothing was held out."""
    best: float | None = None
    best_metric: str = "loss"
    steps: int = 0
    tokens: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None


def outcome(run: RunFiles, curves: Curves) -> Outcome:
    evaluated = {
        name.removeprefix("eval/"): series.last
        for name, series in curves.items()
        if name.startswith("eval/") and series.last is not None and name.removeprefix("eval/") not in COUNTS
    }
    training = curves.get("loss")
    if not evaluated and training and training.last is not None:
        evaluated = {"training loss": training.last}
    metric = _chosen_metric(run, curves)
    best = run.result.get("best")
    value = best.get("value") if isinstance(best, dict) else _best(curves.get(f"eval/{metric}"), metric)
    return Outcome(
        status=run.status,
        reason=run.reason,
        metrics={name: last for name, last in evaluated.items() if last is not None},
        best=value,
        best_metric=str(best.get("metric", metric)) if isinstance(best, dict) else metric,
        steps=_steps(run, curves),
        tokens=run.result.get("tokens") or _last(curves, "tokens"),
        seconds=run.result.get("seconds") or _seconds(curves),
        tokens_per_second=run.result.get("tokens_per_second") or _mean_speed(curves),
        peak_memory_gib=run.result.get("peak_memory_gib") or _last(curves, "peak_memory_gib"),
    )


def figures(run: RunFiles, curves: Curves) -> list[Figure]:
    """Return the headline numbers of one run; what was never measured is left out."""
    result = outcome(run, curves)
    metric = _chosen_metric(run, curves)
    headlines = []
    for name in dict.fromkeys(["loss", metric, "accuracy"]):
        series = curves.get(f"eval/{name}")
        if series and series.last is not None:
            headlines.append(_change(plain_name(name), series, is_lower_better(name)))
    rows = run.result.get("held_out_rows")
    if headlines and type(rows) is int and 0 < rows < FEW_ROWS:
        headlines.append(Figure("held-out rows", str(rows), "so few say little"))
    training = curves.get("loss")
    if not headlines and training and training.last is not None:
        headlines.append(_change("training loss", training, True))
    if result.best is not None:
        best = section(run.result, "best")
        at = f"at step {best['step']:,}" if isinstance(best.get("step"), int) else ""
        headlines.append(Figure(f"best {plain_name(result.best_metric)}", number(result.best), at))
    overfitting = section(run.result, "overfitting")
    if isinstance(overfitting.get("gap"), (int, float)):
        training_loss = number(overfitting.get("training_loss"))
        headlines.append(
            Figure("gap", number(overfitting["gap"]), f"held-out loss above that of training, {training_loss}")
        )
    test = section(run.result, "test")
    for name, value in test.items():
        if name in (metric, "loss", "accuracy") and isinstance(value, (int, float)):
            headlines.append(Figure(f"test {plain_name(name)}", number(value)))
    headlines += _against_prompting(run, curves, metric)
    planned = section(run.config, "trainer").get("max_steps")
    of_planned = f"of {planned:,}" if isinstance(planned, int) and planned != result.steps else ""
    epoch = _last(curves, "epoch")
    headlines.append(
        Figure("steps", f"{result.steps:,}", of_planned or (f"{number(epoch, 3)} epochs" if epoch else ""))
    )
    if result.tokens:
        headlines.append(Figure("tokens", short(result.tokens)))
    if result.tokens_per_second:
        headlines.append(Figure("tokens/s", short(result.tokens_per_second)))
    if result.peak_memory_gib:
        headlines.append(Figure("peak memory", f"{result.peak_memory_gib:.2f} GiB", "a rank"))
    if result.seconds:
        headlines.append(Figure("time", duration(result.seconds)))
    return headlines


def _against_prompting(run: RunFiles, curves: Curves, metric: str) -> list[Figure]:
    """Return what the untuned model reaches when it is asked, the best number of examples first named, and how far training is
    from it: of the metrics that a reader would judge by, those that both have."""
    tested = section(run.result, "test")
    comparisons = []
    for name in dict.fromkeys([metric, "chrf", "accuracy"]):
        prompted_rows = [
            row for row in baseline_file.read(run.path) if isinstance(section(row, "metrics").get(name), (int, float))
        ]
        if not prompted_rows:
            continue
        lower = is_lower_better(name)
        best = (min if lower else max)(prompted_rows, key=lambda row: row["metrics"][name])
        reached = tested.get(name) if best.get("split") == "test" else _last(curves, f"eval/{name}")
        value = best["metrics"][name]
        label = f"untuned {plain_name(name)}, {best.get('shots')} examples"
        if not isinstance(reached, (int, float)):
            comparisons.append(Figure(label, number(value), str(best.get("split"))))
            continue
        good = None if reached == value else (reached < value) == lower
        verdict = "no better than prompting" if not good else "better than prompting"
        comparisons.append(Figure(label, number(value), f"trained {number(reached)}: {verdict}", good))
    return comparisons


def _change(label: str, series: Series, lower_is_better: bool) -> Figure:
    first, last = series.first, series.last
    assert first is not None and last is not None
    if len(series.finite) < 2 or series.steps[-1] == series.steps[0]:
        return Figure(label, number(last))
    change = (last - first) / abs(first) if first else 0.0
    sign = "+" if change > 0 else MINUS if change < 0 else "±"
    good = None if abs(change) < 5e-4 else (change < 0) == lower_is_better
    return Figure(label, number(last), f"from {number(first)}, {sign}{_rough(change)}", good)


def _rough(change: float) -> str:
    share = abs(100 * change)
    return f"{share:.0f}\u2009%" if share >= 10 else f"{share:.1f}\u2009%"


def outcomes_table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the results of all runs as columns, each cell with its text and whether it is the best of its column."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.metrics)
    columns: list[tuple[str, list[float | None], bool | None, Any]] = [
        (
            plain_name(name),
            [outcome.metrics.get(name) for outcome in outcomes],
            name not in _higher_is_better(names),
            number,
        )
        for name in names
    ]
    columns += [
        ("steps", [outcome.steps for outcome in outcomes], None, number),
        ("tokens", [outcome.tokens for outcome in outcomes], None, short),
        ("tokens/s", [outcome.tokens_per_second for outcome in outcomes], False, short),
        ("GiB a rank", [outcome.peak_memory_gib for outcome in outcomes], True, lambda value: number(value, 3)),
        ("time", [outcome.seconds for outcome in outcomes], None, duration),
    ]
    table = []
    for label, values, lower, format_value in columns:
        present = [value for value in values if value is not None]
        if not present:
            continue
        best = None
        if lower is not None and len(present) > 1 and min(present) != max(present):
            best = min(present) if lower else max(present)
        cells = [
            {"text": format_value(value) if value is not None else NONE, "best": best is not None and value == best}
            for value in values
        ]
        table.append({"label": label, "cells": cells})
    return table


def _higher_is_better(names: Mapping[str, Any]) -> set[str]:
    return {name for name in names if not is_lower_better(name) and name != "training loss"}


def _chosen_metric(run: RunFiles, curves: Curves) -> str:
    metric = str(section(section(run.config, "trainer"), "early_stopping").get("metric") or "loss")
    return metric if f"eval/{metric}" in curves else "loss"


def _best(series: Series | None, metric: str) -> float | None:
    if series is None or not series.finite:
        return None
    return min(series.finite) if is_lower_better(metric) else max(series.finite)


def _last(curves: Curves, name: str) -> float | None:
    series = curves.get(name)
    return series.last if series else None


def _steps(run: RunFiles, curves: Curves) -> int:
    if isinstance(run.result.get("steps"), int):
        return int(run.result["steps"])
    return max((curves[name].steps[-1] for name in ("loss", "lr") if name in curves), default=0)


def _seconds(curves: Curves) -> float | None:
    """Return time of the logged steps and evaluations, for a run without a result."""
    spent = [sum(curves[name].finite) for name in ("step_seconds", "eval/seconds") if name in curves]
    return sum(spent) if spent else None


def _mean_speed(curves: Curves) -> float | None:
    """Return tokens over seconds of the logged steps, for a run without a result."""
    speed, seconds = curves.get("tokens_per_second"), curves.get("step_seconds")
    if not speed or not seconds or len(speed.values) != len(seconds.values):
        return None
    pairs = [(a, b) for a, b in zip(speed.values, seconds.values, strict=True) if a is not None and b]
    return sum(a * b for a, b in pairs) / sum(b for _, b in pairs) if pairs else None
