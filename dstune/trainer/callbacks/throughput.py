"""Measures how fast a run is: tokens, positions and targets per second, and the utilization of its devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dstune.protocols import callback
from dstune.protocols.callback import CONTINUE, Callback, Request, Run

if TYPE_CHECKING:
    from dstune.trainer.utilization import Utilization

POSITIONS, TARGETS, FLOPS = "positions", "targets", "flops"
"""Names of a step's counts: positions computed, tokens that count in the loss, floating-point operations needed."""


@callback
class Throughput(Callback):
    """Reports the speed of each step, and of all timed steps together: those without evaluation, saving and profiling, except the
    first two of each launch."""

    name = "throughput"
    needs_loss_at_step_end = False
    order = 72

    def __init__(self, utilization: Utilization):
        self._utilization = utilization
        self._local: dict[str, float] = {}
        """This rank's counts of the current step."""
        self._used: dict[str, float] = {}
        """Counts of the current step over all ranks."""
        self._capacity = 0.0
        self.timed = {"tokens": 0, "seconds": 0.0, "flops": 0.0, "capacity": 0.0}
        """Sums over the timed steps. `flops` (operations needed) and `capacity` (operations that the ranks could have done) are of
        the steps whose utilization is known. Sums, not a rate, since the next launch may have other devices."""

    @classmethod
    def for_run(cls, run: Any) -> Throughput:
        return cls(run.utilization)

    def on_step_end(self, run: Run, step: Any) -> Request:
        counted = step.batch.counted
        flops = self._utilization.flops(counted, run.engine.frozen_groups)
        used = {POSITIONS: counted.positions, TARGETS: counted.targets, FLOPS: flops}
        # Ranks that share rows have all counted the same rows.
        world = run.world
        self._local = {name: value * world.data_parallel_size / world.size for name, value in used.items()}
        return CONTINUE

    def numbers(self) -> Mapping[str, float]:
        local_counts, self._local = self._local, {}
        return local_counts

    def agreed(self, run: Run, numbers: Mapping[str, Sequence[float]]) -> None:
        self._used = {name: sum(values) for name, values in numbers.items()}

    def on_step_agreed(self, run: Run, step: Any) -> Request:
        self._capacity = self._utilization.capacity(step.seconds)
        if step.timed:
            self.timed["tokens"] += step.batch.tokens
            self.timed["seconds"] += step.seconds
            self.timed["flops"] += self._used[FLOPS]
            self.timed["capacity"] += self._capacity
        return CONTINUE

    def metrics(self, run: Run, step: Any) -> Mapping[str, float]:
        return {"tokens_per_second": step.batch.tokens / step.seconds} | rates(self._used, step.seconds, self._capacity)

    def results(self) -> Mapping[str, Any]:
        speed, utilization = self.tokens_per_second, self.utilization
        values: dict[str, Any] = {"tokens_per_second": speed and round(speed, 2)}
        return values | {"utilization": round(utilization, 6)} if utilization else values

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the timed steps; None if no step was timed."""
        return self.timed["tokens"] / self.timed["seconds"] if self.timed["seconds"] else None

    @property
    def utilization(self) -> float | None:
        """Fraction of the devices' capacity that the timed steps used; None if it is not known for any of them."""
        return self.timed["flops"] / self.timed["capacity"] if self.timed["capacity"] else None

    def on_rewind(self, run: Run, saved: Mapping[str, Any] | None) -> None:
        """Keep the counts: undone steps took time, too."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self.timed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.timed = dict(state)


def rates(used: Mapping[str, float], seconds: float, capacity: float) -> dict[str, float]:
    """Return the metrics of a step with the counts `used` over all ranks, except those that are not known."""
    metrics = {"positions_per_second": used[POSITIONS] / seconds, "targets_per_second": used[TARGETS] / seconds}
    if capacity:
        metrics["utilization"] = used[FLOPS] / capacity
    return {name: value for name, value in metrics.items() if value}
