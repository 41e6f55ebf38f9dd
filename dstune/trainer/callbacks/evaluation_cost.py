"""Reports how much of a run's time its evaluations take."""

from __future__ import annotations

from typing import Any

from dstune.config.cadence import cadence
from dstune.config.schema import RunConfig
from dstune.protocols import callback, task_of
from dstune.protocols.callback import CONTINUE, Callback, Evaluation, Request, Run, Step

MAX_FRACTION = 0.1
"""Above this fraction of the run's time, the console suggests evaluating less."""


def evaluations(config: RunConfig, total_steps: int, epochs: float | None) -> int:
    """Count the evaluations of a complete run of `total_steps` steps and `epochs` passes over the rows, including those before
    the first step and at the end."""
    return int(config.evaluate.at_start) + (cadence(config.evaluate.every).times(total_steps, epochs) or 1)


def fraction(count: int, total_steps: int, evaluation_seconds: float, step_seconds: float) -> float:
    """Return the fraction of the run's time that its `count` evaluations take. Saving and start-up do not count.

    Example: 100 steps of 1 s, an evaluation of 5 s every 50 steps and one at the start, 3 in all: 15 / 115 = 0.13.
    """
    evaluating = count * evaluation_seconds
    return evaluating / (evaluating + total_steps * step_seconds)


def describe_cost(
    config: RunConfig, total_steps: int, epochs: float | None, evaluation_seconds: float, step_seconds: float
) -> str:
    """Describe the cost of evaluations in one line; if it is high, name the settings that lower it."""
    count = evaluations(config, total_steps, epochs)
    share = fraction(count, total_steps, evaluation_seconds, step_seconds)
    subject = f"{count} evaluations" if count > 1 else "the evaluation"
    line = (
        f"{subject} of {evaluation_seconds:.1f} s: about {100 * share:.0f}% of the run's time "
        f"({total_steps:,} steps of {step_seconds:.2f} s)"
    )
    if share <= MAX_FRACTION:
        return line
    fewer = "evaluate.max_rows=N" if config.evaluate.every == 0 else "evaluate.max_rows=N or a larger evaluate.every"
    generated = (
        ", evaluate.generate_rows=N"
        if task_of(config.task).generation_metrics and config.evaluate.generate_rows != 0
        else ""
    )
    return f"warning: {line}; {fewer}{generated} takes less"


@callback
class EvaluationCost(Callback):
    """Reports the cost of evaluations once, as soon as an evaluation and `STEPS` steps have been timed."""

    name = "evaluation_cost"
    order = 80

    STEPS = 3
    """How many timed steps it takes to estimate the duration of a step."""

    def __init__(self, config: RunConfig, total_steps: int, epochs: float | None):
        self._config, self._total_steps, self._epochs = config, total_steps, epochs
        self._evaluation_seconds: float | None = None
        self._step_seconds: list[float] = []
        self._reported = False

    @classmethod
    def for_run(cls, run: Any) -> EvaluationCost:
        return cls(run.config, run.total_steps, run.epochs)

    def on_step_agreed(self, run: Run, step: Step) -> Request:
        if step.timed and run.log and (line := self.stepped(step.seconds)):
            run.log.message(line)
        return CONTINUE

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> Request:
        if run.log and (line := self.evaluated(evaluation.seconds)):
            run.log.message(line)
        return CONTINUE

    def stepped(self, seconds: float) -> str | None:
        """Return what to report after a step that took `seconds`."""
        if not self._reported:
            self._step_seconds.append(seconds)
        return self._line()

    def evaluated(self, seconds: float) -> str | None:
        """Return what to report after an evaluation that took `seconds`."""
        self._evaluation_seconds = seconds
        return self._line()

    def _line(self) -> str | None:
        if self._reported or self._evaluation_seconds is None or len(self._step_seconds) < self.STEPS:
            return None
        self._reported = True
        step_seconds = sum(self._step_seconds) / len(self._step_seconds)
        return describe_cost(self._config, self._total_steps, self._epochs, self._evaluation_seconds, step_seconds)
