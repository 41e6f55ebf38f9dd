"""Where a run is: everything that a checkpoint has to remember beside weights and optimizer states.

Generators are not here: every micro-batch seeds them from (seed, step, index), so there is nothing to remember. Where the
data is follows from the number of optimizer steps, except in a stream.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Best:
    metric: str
    value: float
    step: int


@dataclass
class TrainState:
    step: int = 0
    """Windows that are done, skipped ones included."""
    planned_steps: int = 0
    """How many the run was to have, which its schedule depends on."""
    skipped_windows: int = 0
    """Windows of the data that were left out when the run went back to a checkpoint because of them."""
    tokens: int = 0
    """Non-padding tokens seen, over all ranks."""
    targets: float = 0
    """Tokens (or rows) that counted in the loss, over all ranks."""
    nonfinite_steps: int = 0
    """Steps skipped because a loss or gradient was not finite."""
    overflow_steps: int = 0
    """fp16 steps skipped while the loss scale was found."""
    seconds: float = 0.0
    """Time in the command's ranks so far, over all launches."""
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    """Tokens and time of the steps that count for throughput: without evaluation, saving and each launch's first two."""
    timed_flops: float = 0.0
    timed_capacity: float = 0.0
    """Of those among them whose utilisation is known: operations that they needed, and that the ranks could have done. Not
    the latter's rate, since a launch may have other devices than the one before."""
    save_seconds: float = 0.0
    """Time that the last save took."""
    peak_memory_gib: float = 0.0
    best: Best | None = None
    evaluations_without_gain: int = 0
    evaluation_due: bool = False
    """The last step was one to evaluate after, but the run was stopped before."""
    eval_initial: dict[str, float] | None = None
    eval_last: dict[str, float] | None = None
    eval_last_step: int = -1
    fit_loss_sum: float = 0.0
    fit_weight: float = 0.0
    """Of the training loss since the last evaluation."""
    cursor: dict[str, Any] | None = None
    """Where the next step begins in a stream (`supply.Streamed`); None for data that is there as a whole."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What hooks remember, by their name."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        known = {f.name for f in fields(cls)}
        own = {key: value for key, value in values.items() if key in known}
        best = own.pop("best", None)
        return cls(**own, best=Best(**best) if best else None)

    @property
    def window(self) -> int:
        """Number of the next window of the data."""
        return self.step + self.skipped_windows

    @property
    def tokens_per_second(self) -> float | None:
        """None where no step was timed: a launch's first two are not."""
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else None

    @property
    def utilization(self) -> float | None:
        """Over the timed steps; None where it is of none of them known."""
        return self.timed_flops / self.timed_capacity if self.timed_capacity else None
