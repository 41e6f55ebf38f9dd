"""Chooses the charts of a report from the metrics that its runs logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dstune.report.charts import COLOURS, Chart, Line, Mark, draw
from dstune.report.results import plain_name
from dstune.report.run_files import RunFiles
from dstune.report.series import Series, smoothed, smoothing_span

__all__ = ["COLOURS", "charts"]

Curves = Mapping[str, Series]

TITLES = {
    "reward": "Reward",
    "eval/reward": "Held-out reward",
    "loss": "Training loss",
    "eval/loss": "Held-out loss",
    "eval/gap": "Held-out loss above training loss",
    "guard/loss": "Loss on data.guard",
    "ood/loss": "Loss on data.ood",
    "eval/perplexity": "Held-out perplexity",
    "eval/token_accuracy": "Held-out token accuracy",
    "eval/accuracy": "Held-out accuracy",
    "eval/f1_macro": "Held-out F1, macro average",
    "eval/f1_micro": "Held-out F1, micro average",
    "reward_std": "Deviation of rewards in a group",
    "frac_reward_zero_std": "Groups whose rewards are all the same",
    "completions/mean_length": "Tokens of an answer",
    "completions/clipped_ratio": "Answers that were cut off",
    "entropy": "Entropy of a token, nats",
    "kl": "Divergence from the start, a token",
    "sampling/sampling_logp_difference/max": "Sampler and training, largest difference of a log-probability",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "utilization": "Model FLOPs utilisation",
    "peak_memory_gib": "Peak memory, GiB a rank",
}
"""The charts in their order; other metrics follow."""

PARTS = {"eval": "Held-out {}", "guard": "{} on data.guard", "ood": "{} on data.ood"}


def title_of(name: str) -> str:
    """Return the title of the chart of a metric."""
    part, _, metric = name.rpartition("/")
    title = TITLES.get(name) or PARTS.get(part, "{}").format(plain_name(metric))
    return title[:1].upper() + title[1:]


NOT_DRAWN = frozenset(
    {"epoch", "tokens", "step_seconds", "eval/seconds"}
    | {f"{part}/{count}" for part in ("eval", "guard", "ood") for count in ("targets", "rows", "tokens", "generated")}
    | {"slowest_rank", "slowest_to_median", "spike_z_score"}
    | {"data_seconds", "forward_seconds", "backward_seconds", "update_seconds"}
    | {"positions_per_second", "targets_per_second"}
)
"""Counters that show the progress of a run, not its quality. Seconds per step are the inverse of tokens per second."""

FROM_ZERO = frozenset({"lr", "tokens_per_second", "utilization", "peak_memory_gib"})
SMOOTHED = frozenset({"loss", "grad_norm", "tokens_per_second", "utilization"})


def charts(runs: Sequence[RunFiles], curves: Sequence[Curves], labels: Sequence[str]) -> list[Chart]:
    """Draw one chart per metric, with one line per run. With a single run, held-out and training loss share a chart, where their
    distance shows overfitting."""
    names = dict.fromkeys(name for name in TITLES if any(name in run_curves for run_curves in curves))
    names |= dict.fromkeys(name for run_curves in curves for name in run_curves if name not in NOT_DRAWN)
    steps = [
        series.steps[end]
        for run_curves in curves
        for name, series in run_curves.items()
        if name in names
        for end in (0, -1)
    ]
    if not steps:
        return []
    span = (min(steps), max(steps))
    window = smoothing_span(max(len(run_curves["loss"].steps) if "loss" in run_curves else 0 for run_curves in curves))
    marks = _marks(runs[0]) if len(runs) == 1 else []
    if len(runs) == 1 and {"loss", "eval/loss"} <= set(names):
        run_curves = curves[0]
        lines, note = _of_run(run_curves["loss"], "training", 0, window)
        lines.append(Line("held-out", run_curves["eval/loss"], 1))
        drawn = [draw("Loss", lines, span, metric="loss eval/loss", note=note, marks=marks, tall=True)]
        del names["loss"], names["eval/loss"]
    else:
        drawn = []
    for name in names:
        lines = []
        note = ""
        for number, (run_curves, label) in enumerate(zip(curves, labels, strict=True)):
            if name in run_curves:
                added, note = _of_run(run_curves[name], label, number, window if name in SMOOTHED else 0)
                # Unsmoothed values of several runs would hide each other.
                lines += added if len(runs) == 1 else added[-1:]
        drawn.append(
            draw(
                title_of(name),
                lines,
                span,
                metric=name,
                note=note if not drawn else "smoothed" * bool(note),
                marks=marks,
                from_zero=name in FROM_ZERO,
                tall=not drawn,
            )
        )
    return drawn


def _of_run(series: Series, label: str, colour: int, window: int) -> tuple[list[Line], str]:
    """Return the line of one run, smoothed over `window` steps with its values behind it (0: as it is), and what to say of it."""
    if not window:
        return [Line(label, series, colour)], ""
    raw = Line(f"{label}, each step", series, colour, faint=True)
    return [raw, Line(label, smoothed(series, window), colour)], f"smoothed over {window} steps"


def _marks(run: RunFiles) -> list[Mark]:
    marks = [
        Mark(info.step, "checkpoint", f"checkpoint at step {info.step:,}" + (", the best one" if info.best else ""))
        for info in run.checkpoints
    ]
    launches = run.environment.get("launches")
    marks += [
        Mark(launch["step"], "resume", f"resumed at step {launch['step']:,}, {launch.get('time', '')}")
        for launch in (launches if isinstance(launches, list) else [])
        if isinstance(launch, dict) and isinstance(launch.get("step"), int) and launch["step"] > 0
    ]
    return marks
