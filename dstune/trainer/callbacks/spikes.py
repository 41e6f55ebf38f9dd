"""Guards against steps whose loss spikes: reports them, skips them, or goes back to a checkpoint and skips the data since.

The score is the robust z-score (Iglewicz and Hoaglin 1993): (loss - median) / (1.4826 * median absolute deviation) over the
losses of the last steps. Mean and standard deviation would be moved by the very spikes that the score is to find.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from dstune.config.schema import RunConfig, SpikeAction
from dstune.protocols import callback
from dstune.protocols.callback import CONTINUE, Action, Callback, Request, Run, Step

SMALLEST_SPREAD = 1e-3
"""Lower bound of the losses' spread, as a fraction of their median: when losses hardly vary, a small change is no spike."""

DONE = {SpikeAction.warn: "warned", SpikeAction.skip: "skipped", SpikeAction.rollback: "rolled back"}


@callback
class Spikes(Callback):
    """Applies `trainer.spike`. All ranks decide alike, since the loss is that of the global batch."""

    name = "spikes"
    order = 60

    def __init__(self, config: RunConfig):
        self._settings = config.trainer.spike
        self._action = self._settings.action
        self._losses: list[float] = []
        """Losses of the last steps."""
        self.events: list[dict[str, Any]] = []
        """What was done about spikes."""
        self._event: dict[str, Any] | None = None
        """The event of the present step."""

    @classmethod
    def for_run(cls, run: Any) -> Spikes:
        return cls(run.config)

    @property
    def can_veto(self) -> bool:
        return self._action in (SpikeAction.skip, SpikeAction.rollback)

    def veto(self, run: Run, loss: float) -> bool:
        return self.is_spike(loss)

    def on_step_agreed(self, run: Run, step: Step) -> Request:
        self._event = event = self.note(step.number, step.loss)
        if event is None:
            return CONTINUE
        action = Action.REWIND if self._action is SpikeAction.rollback else Action.CONTINUE
        if action is Action.CONTINUE and run.log:
            left_out = "; the update is left out" if self._action is SpikeAction.skip else ""
            run.log.message(f"warning: {_described(event)}{left_out}")
        reason = self.stop_reason()
        return Request(action | Action.FAIL, reason) if reason else Request(action)

    def on_rewind(self, run: Run, saved: Mapping[str, Any] | None) -> None:
        """Restore the losses of the checkpoint, keep the events, and report what the rewind did about the spike. If the run is
        killed now and resumed, it meets the same spike again and does the same."""
        event = self._event
        if saved is not None:
            self._losses = list(saved["losses"])  # but not the events: they did happen
        if event is None:  # another callback asked for the rewind
            return
        if saved is None:
            event["action"] = "skipped"
            done = "the update is left out, there is no checkpoint yet to go back to"
        else:
            left_out = event["step"] - run.state.step
            done = f"back to step {run.state.step}, {left_out} global batches of data are left out"
        if run.log:
            run.log.message(f"warning: {_described(event)}; {done}")

    def metrics(self, run: Run, step: Step) -> Mapping[str, float]:
        return {} if self._event is None else {"spike_z_score": self._event["z_score"]}

    def results(self) -> Mapping[str, Any]:
        """Return the number of spikes for each action (warned, skipped, rolled back), and the list of spikes."""
        actions = [event["action"] for event in self.events]
        counts = {name.replace(" ", "_"): actions.count(name) for name in DONE.values()}
        return {"spikes": {**counts, "events": self.events}}

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "events": [dict(event) for event in self.events]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses, self.events = list(state["losses"]), [dict(event) for event in state["events"]]

    def score(self, loss: float) -> float | None:
        """Return how far `loss` lies above the losses of the previous steps, in robust standard deviations; None if there are too
        few of them, or if `loss` is not finite (`NonFinite` counts those)."""
        if len(self._losses) < self._settings.window // 2 or not math.isfinite(loss):
            return None
        median = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss_before - median) for loss_before in self._losses)
        return (loss - median) / max(spread, SMALLEST_SPREAD * abs(median), 1e-12)

    def is_spike(self, loss: float) -> bool:
        if self._action is SpikeAction.none:
            return False
        score = self.score(loss)
        return score is not None and score > self._settings.z_score

    def note(self, step: int, loss: float) -> dict[str, Any] | None:
        """Remember the loss of a step; return the event if it was a spike."""
        if self._action is SpikeAction.none:
            return None
        score, spike = self.score(loss), self.is_spike(loss)
        if math.isfinite(loss):
            self._losses = [*self._losses, loss][-self._settings.window :]
        if not spike or score is None:
            return None
        event = {"step": step, "loss": loss, "z_score": round(score, 2), "action": DONE[self._action]}
        self.events.append(event)
        return event

    def stop_reason(self) -> str:
        """Return why the run has to stop (more spikes than `trainer.spike.limit` allows); empty if it goes on."""
        acted = [event for event in self.events if event["action"] != DONE[SpikeAction.warn]]
        if len(acted) <= self._settings.limit:
            return ""
        return (
            f"the loss spiked in {len(acted)} steps, the last one step {acted[-1]['step']} "
            f"(trainer.spike.limit={self._settings.limit}): lower optimizer.lr, set trainer.grad_clip, or look at the data"
        )


def _described(event: Mapping[str, Any]) -> str:
    return f"the loss of step {event['step']} leaps to {event['loss']:.4g} ({event['z_score']:g} robust standard deviations)"
