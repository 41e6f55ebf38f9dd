"""What training does to rows that are not its own: `data.guard` and `data.ood`, evaluated before and after."""

from __future__ import annotations

from dstune.train.loop import Training

WATCHED = {"guard": "what is not to be forgotten", "ood": "another domain"}
"""Parts of the data, and what they are called on the console."""


def watch(run: Training, moment: str) -> None:
    """Evaluate the watched parts and remember their metrics in the state, as `before` or `after` (`moment`). Every rank must
    call it."""
    for part, meaning in WATCHED.items():
        split = getattr(run.data, part)
        if split is None:
            continue
        with run.watchdog.patient(f"evaluating data.{part}"):
            metrics = run.evaluator(split, slices=False).metrics
        found = run.state.extra.setdefault(part, {})
        found[moment] = metrics
        if run.log:
            run.log.log(run.state.step, {f"{part}/{name}": value for name, value in metrics.items()})
        if run.log and moment == "after":
            run.log.message(f"{part} ({meaning}): {told(found)}")


def told(found: dict[str, dict[str, float]]) -> str:
    """`loss 2.1 -> 2.4, ...`. found: metrics by moment; of a run that began without the part, there is no `before`."""
    before = found.get("before", {})
    parts = []
    for name, value in found["after"].items():
        started = f"{before[name]:.4g} -> " if name in before else ""
        if name not in ("targets", "generated", "rows"):
            parts.append(f"{name} {started}{value:.4g}")
    return ", ".join(parts)
