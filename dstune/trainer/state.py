"""The progress of a run: everything that a checkpoint stores besides weights and optimizer states.

It has no states of random generators, since every micro-batch seeds them from (seed, step, index). The position in the data
follows from the number of optimizer steps, except in a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dstune.core.errors import Problem, UserError

FORMAT = 2
"""Format of `state.json`. Format 1, whose number is not in the file, kept the states of callbacks as fields of TrainState."""


@dataclass
class Best:
    metric: str
    value: float
    step: int


@dataclass
class TrainState:
    step: int = 0
    """Optimizer steps so far, including skipped ones."""
    planned_steps: int = 0
    """Optimizer steps that the run was planned with; the schedule depends on it."""
    left_out_batches: int = 0
    """Global batches that rewinds to a checkpoint have left out of the data."""
    tokens: int = 0
    """Non-padding tokens seen, over all ranks."""
    targets: float = 0
    """Tokens (or rows) that counted in the loss, over all ranks."""
    seconds: float = 0.0
    """Time that the ranks have run so far, over all launches."""
    save_seconds: float = 0.0
    """Time that the last save took."""
    best: Best | None = None
    """The best evaluation of trained weights."""
    evaluation_due: bool = False
    """An evaluation was due after the last step, but the run had to end first."""
    eval_initial: dict[str, float] | None = None
    eval_last: dict[str, float] | None = None
    eval_last_step: int = -1
    cursor: dict[str, Any] | None = None
    """Where the next step begins in a stream (`StreamingLoader`); None for other data."""
    results: dict[str, Any] = field(default_factory=dict)
    """Entries of `result.json` besides the metrics, by their names there."""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The states of callbacks by name, including those that this launch does not use."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Rebuild a state from its `to_dict`.

        Raises:
            UserError: `values` has a field that this version does not know, since dropping it would lose something; or a value
                of the wrong type.
        """
        _refuse_unknown(values, {f.name for f in fields(cls)})
        remaining = dict(values)
        best = remaining.pop("best", None)
        for name, value in remaining.items():
            if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and bool not in _TYPES[name]):
                raise _wrong_type(name)
        try:
            return cls(**remaining, best=Best(**best) if best else None)
        except TypeError:
            raise _wrong_type("best") from None

    @property
    def next_batch(self) -> int:
        """Number of the next global batch of the data, from 0."""
        return self.step + self.left_out_batches


_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "planned_steps", "left_out_batches", "eval_last_step"), (int,)),
    **dict.fromkeys(("tokens", "targets", "seconds", "save_seconds"), _NUMBER),
    **dict.fromkeys(("eval_initial", "eval_last", "cursor"), (dict, type(None))),
    **dict.fromkeys(("results", "callbacks"), (dict,)),
    "evaluation_due": (bool,),
}
"""Types of the fields of TrainState in `state.json`."""


def _wrong_type(name: str) -> UserError:
    reason = (
        f"the checkpoint's state.json is damaged or was not written by dstune: {name} has a value of the wrong type"
    )
    return UserError(Problem("run.dir", reason, "continue from another checkpoint"))


def _refuse_unknown(values: Mapping[str, Any], field_names: set[str]) -> None:
    if unknown := sorted(values.keys() - field_names):
        reason = f"the checkpoint's state.json has fields that this version does not know: {', '.join(unknown)}"
        raise UserError(Problem("run.dir", reason, "continue the run with the version of dstune that wrote it"))


def upgrade_state(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the content of a `state.json` of any format to the present one.

    Raises UserError if the format is newer, or a field is unknown.
    """
    version = saved.get("format", 1)
    if version == FORMAT:
        return dict(saved)
    if version != 1:
        reason = f"the checkpoint's state.json has format {version}, and this version of dstune reads up to {FORMAT}"
        raise UserError(Problem("run.dir", reason, "continue the run with a newer version of dstune"))
    upgraded = {"format": FORMAT, **saved}
    if isinstance(saved.get("train"), Mapping):
        upgraded["train"] = _from_format_1(saved["train"])
    return upgraded


_MOVED = {
    "nonfinite_steps": ("nonfinite", "nonfinite_steps"),
    "overflow_steps": ("nonfinite", "overflow_steps"),
    "timed_tokens": ("throughput", "tokens"),
    "timed_seconds": ("throughput", "seconds"),
    "timed_flops": ("throughput", "flops"),
    "timed_capacity": ("throughput", "capacity"),
    "peak_memory_gib": ("memory", "peak_memory_gib"),
    "evaluations_without_gain": ("early_stopping", "evaluations_without_gain"),
    "fit_loss_sum": ("overfitting", "loss_sum"),
    "fit_weight": ("overfitting", "weight"),
}
"""Fields of format 1 that callbacks took over: the callback, and the field in its state."""

_RENAMED = {"skipped_windows": "left_out_batches"}


def _from_format_1(train: Mapping[str, Any]) -> dict[str, Any]:
    kept_names = {f.name for f in fields(TrainState)} - {"results", "callbacks", *_RENAMED.values()}
    _refuse_unknown(train, {*kept_names, *_MOVED, *_RENAMED, "extra"})
    upgraded = {name: train[name] for name in train if name in kept_names}
    upgraded |= {new: train[old] for old, new in _RENAMED.items() if old in train}
    if not isinstance(train.get("extra", {}), dict):
        raise _wrong_type("extra")
    results = dict(train.get("extra", {}))
    callbacks: dict[str, dict[str, Any]] = {}
    for old, (callback, name) in _MOVED.items():
        callbacks.setdefault(callback, {})[name] = train.get(old, 0)  # 0: the run is older than the field
    if "spikes" in results:
        callbacks["spikes"] = results.pop("spikes")
    return upgraded | {"results": results, "callbacks": callbacks}
