"""A guard against steps whose loss leaps: told, left out, or undone together with the data that led there.

The score is the robust z-score (Iglewicz and Hoaglin 1993): (loss - median) / (1.4826 * median absolute deviation) over the
losses of the last steps. Mean and standard deviation would be moved by the very spike that they are to find.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from dstune.config.schema import RunConfig, SpikeAction
from dstune.train.state import TrainState

NAME = "spikes"
"""Key in `TrainState.extra`: the losses that are compared with, and what was done about spikes."""

SMALLEST_SPREAD = 1e-3
"""Share of the median below which the spread of the losses counts as this: a loss that hardly moves is no reason to act."""


class SpikeGuard:
    """The same on every rank, since it sees the loss of the whole window only."""

    def __init__(self, config: RunConfig):
        self._settings = config.trainer.spike
        self.action = self._settings.action
        self.before_update = self.action in (SpikeAction.skip, SpikeAction.rollback)
        """Whether the loss is needed before the optimizer's step."""

    def score(self, state: TrainState, loss: float) -> float | None:
        """How far `loss` lies above the losses of the steps before, in robust standard deviations; None where there are
        too few of them, or it is not finite (which `hooks.NonFinite` counts)."""
        losses = state.extra.get(NAME, {}).get("losses", [])
        if len(losses) < self._settings.window // 2 or not math.isfinite(loss):
            return None
        median = statistics.median(losses)
        spread = 1.4826 * statistics.median(abs(one - median) for one in losses)
        return (loss - median) / max(spread, SMALLEST_SPREAD * abs(median), 1e-12)

    def is_spike(self, state: TrainState, loss: float) -> bool:
        if self.action is SpikeAction.none:
            return False
        score = self.score(state, loss)
        return score is not None and score > self._settings.z_score

    def note(self, state: TrainState, loss: float) -> dict[str, Any] | None:
        """Remember the loss of the step that was just done; what there is to tell where it was a spike."""
        if self.action is SpikeAction.none:
            return None
        score, spike = self.score(state, loss), self.is_spike(state, loss)
        memory = state.extra.setdefault(NAME, {"losses": [], "events": []})
        if math.isfinite(loss):
            memory["losses"] = [*memory["losses"], loss][-self._settings.window :]
        if not spike or score is None:
            return None
        done = {SpikeAction.warn: "warned", SpikeAction.skip: "skipped", SpikeAction.rollback: "rolled back"}
        event = {"step": state.step, "loss": loss, "z_score": round(score, 2), "action": done[self.action]}
        memory["events"].append(event)
        return event

    def exhausted(self, state: TrainState) -> str:
        """Why the run has to stop: more spikes than are acted on; empty where it has not."""
        acted = [event for event in events(state) if event["action"] != "warned"]
        if len(acted) <= self._settings.limit:
            return ""
        return (
            f"the loss spiked in {len(acted)} steps, the last one step {acted[-1]['step']} "
            f"(trainer.spike.limit={self._settings.limit}): lower optimizer.lr, set trainer.grad_clip, or look at the data"
        )


def events(state: TrainState) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = state.extra.get(NAME, {}).get("events", [])
    return found


def counts(state: TrainState) -> dict[str, int]:
    """For result.json: how many spikes there were, by what was done about them."""
    found = [event["action"] for event in events(state)]
    return {name.replace(" ", "_"): found.count(name) for name in ("warned", "skipped", "rolled back")}
