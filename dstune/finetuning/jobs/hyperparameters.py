"""Validates the hyperparameters of a request and resolves "auto"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import core_schema

from dstune.serve.validation import wrong

AUTO = "auto"
Value = int | float | str
MOST_NUMBER = 1e9
"""Beyond every range; larger integers may overflow a float."""


@dataclass(frozen=True)
class Range:
    """A range of numbers. least, most: inclusive bounds; above: exclusive bound."""

    whole: bool
    least: float | None = None
    above: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        bounds = [f"at least {self.least:g}"] if self.least is not None else []
        bounds += [f"above {self.above:g}"] if self.above is not None else []
        bounds += [f"at most {self.most:g}"] if self.most is not None else []
        return f"'auto' or {kind} of {' and '.join(bounds)}" if bounds else f"'auto' or {kind}"

    def read(self, value: Any) -> Value | None:
        """Return the value, with whole floats as integers; None if it is outside the range."""
        if value == AUTO and isinstance(value, str):
            return AUTO
        if isinstance(value, bool) or not isinstance(value, int | float) or not -MOST_NUMBER < value < MOST_NUMBER:
            return None
        if self.whole and value != int(value):
            return None
        inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )
        return (int(value) if self.whole else float(value)) if inside else None


class Hyperparameter:
    """Validates a field with a range, as a pydantic annotation."""

    def __init__(self, bounds: Range):
        self._bounds = bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def check(value: Any) -> Value | None:
            read_value = None if value is None else self._bounds.read(value)
            if value is not None and read_value is None:
                raise wrong(f"must be {self._bounds}")
            return read_value

        return core_schema.no_info_plain_validator_function(check)


SUPERVISED: Mapping[str, Range] = {
    "n_epochs": Range(whole=True, least=1, most=50),
    "batch_size": Range(whole=True, least=1, most=256),
    "learning_rate_multiplier": Range(whole=False, above=0, most=1000),
}
DPO: Mapping[str, Range] = {**SUPERVISED, "beta": Range(whole=False, above=0, most=2)}
REINFORCEMENT: Mapping[str, Range] = {
    **SUPERVISED,
    "compute_multiplier": Range(whole=False, above=1e-5, most=10),
    "eval_interval": Range(whole=True, least=1),
    "eval_samples": Range(whole=True, least=1),
}
METHODS: Mapping[str, Mapping[str, Range]] = {"supervised": SUPERVISED, "dpo": DPO, "reinforcement": REINFORCEMENT}
PLACES = {
    name: f"method.{kind}.hyperparameters.{name}"
    for kind in ("reinforcement", "dpo", "supervised")
    for name in METHODS[kind]
}
"""Where each hyperparameter is in a request. For one that two methods have, its place in the default method."""

DEFAULT_BETA = 0.1
SAMPLES = 8
"""Answers per prompt at the compute multiplier 1."""
EVALUATED_ROWS = 200
"""Validation rows per evaluation of a reinforcement job, unless the job sets another number."""
EPOCHS = 3
FEWEST_ROWS, MOST_ROWS = 100, 25_000
"""Automatic epochs bring rows times epochs between these two."""
MOST_AUTOMATIC_EPOCHS = 25
BATCH_SHARE = 0.002
MOST_BATCH = 256


def resolve(requested: Mapping[str, Value], rows: int, ranks: int = 1) -> dict[str, Value]:
    """Return numbers for every hyperparameter, with "auto" resolved for a training file of `rows` rows. ranks: processes that share
    a batch; an automatic batch size is a multiple of it."""
    automatic: dict[str, Value] = {
        "n_epochs": epochs(rows),
        "batch_size": batch_size(rows, ranks),
        "learning_rate_multiplier": 1.0,
        "beta": DEFAULT_BETA,
        "compute_multiplier": 1.0,
        "eval_samples": EVALUATED_ROWS,
    }
    size = automatic["batch_size"] if requested["batch_size"] == AUTO else requested["batch_size"]
    automatic["eval_interval"] = max(1, math.ceil(rows / int(size)))  # once an epoch
    return {name: automatic[name] if value == AUTO else value for name, value in requested.items()}


def epochs(rows: int) -> int:
    """Return the automatic number of epochs: 3, more for fewer than 34 rows, fewer for more than 8,333. This is the rule of the
    vendor's public data preparation notebook."""
    if rows * EPOCHS < FEWEST_ROWS:
        return min(MOST_AUTOMATIC_EPOCHS, FEWEST_ROWS // max(1, rows))
    if rows * EPOCHS > MOST_ROWS:
        return max(1, MOST_ROWS // rows)
    return EPOCHS


def batch_size(rows: int, ranks: int = 1) -> int:
    """Return the automatic batch size: 0.2% of the rows, from 1 to 256, rounded to a multiple of the ranks if the rows allow it."""
    size = min(MOST_BATCH, max(1, round(rows * BATCH_SHARE)))
    if ranks > 1 and rows >= ranks:
        size = min(max(ranks, round(size / ranks) * ranks), MOST_BATCH // ranks * ranks or size)
    return size


def steps(rows: int, resolved: Mapping[str, Value]) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the job: a step never spans epochs."""
    per_epoch = math.ceil(rows / int(resolved["batch_size"]))
    return per_epoch, per_epoch * int(resolved["n_epochs"])
