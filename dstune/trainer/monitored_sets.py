"""Measures what training does to rows that it does not train on: evaluates `data.guard` and `data.ood` before and after."""

from __future__ import annotations

from dstune.trainer.loop import Training

MONITORED = {"guard": "abilities to retain", "ood": "another domain"}
"""Splits of the data, and what the console calls them."""


def evaluate_monitored_sets(run: Training, moment: str) -> None:
    """Evaluate the monitored sets and store their metrics in the state under `moment`, which is `before` or `after`. Every rank
    must call it."""
    for name, meaning in MONITORED.items():
        split = getattr(run.data, name)
        if split is None:
            continue
        with run.around(f"evaluating data.{name}"):
            metrics = run.evaluator(split, slices=False).metrics
        metrics_by_moment = run.state.results.setdefault(name, {})
        metrics_by_moment[moment] = metrics
        if run.log:
            run.log.log(run.state.step, {f"{name}/{metric}": value for metric, value in metrics.items()})
        if moment == "after":
            run.message(f"{name} ({meaning}): {format_change(metrics_by_moment)}")


def format_change(metrics_by_moment: dict[str, dict[str, float]]) -> str:
    """Format the change as `loss 2.1 -> 2.4, ...`. If the run began without the set, there are no metrics `before`."""
    metrics_before = metrics_by_moment.get("before", {})
    changes = []
    for name, value in metrics_by_moment["after"].items():
        started = f"{metrics_before[name]:.4g} -> " if name in metrics_before else ""
        if name not in ("targets", "generated", "rows"):
            changes.append(f"{name} {started}{value:.4g}")
    return ", ".join(changes)
