"""Reads the records of a sweep's trials (`SWEEP/trials/NAME.json`) and ranks them, for the sweep, the report and `dstune runs`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from dstune.config.sweep_rules import COSTS, LOWER_COSTS
from dstune.core.parsing import parse_json, parse_yaml, read_file
from dstune.metrics import is_lower_better

SWEEP_FILE = "sweep.yaml"
RECORDS = "trials"
FINISHED = ("completed", "stopped", "pruned")
"""Statuses of trials that are not restarted."""
MAX_SECONDS = 1e11
"""Three thousand years."""
TRAINING_LOSS = "training_loss"
"""The objective of trials without validation rows: the mean loss over the last tenth of the steps."""


def less_is_better(objective: str) -> bool:
    """Return whether lower is better for a metric, TRAINING_LOSS or a cost."""
    return is_lower_better(objective) or objective in (TRAINING_LOSS, *LOWER_COSTS)


@dataclass(frozen=True)
class Record:
    """The record of a trial, which also exists if the trial failed before it had a run directory."""

    name: str
    number: int
    values: dict[str, Any]
    """Value of each key that the sweep varies."""
    status: str = "running"
    """`running`; completed, stopped, preempted or failed as in result.json; `pruned`."""
    reason: str = ""
    objective: dict[str, float] = field(default_factory=dict)
    place: str = ""
    """Machine and devices that the last start used."""
    seconds: float = 0.0
    """Seconds from start to end, summed over all starts."""
    starts: int = 0


def is_sweep(path: Path) -> bool:
    return (path / SWEEP_FILE).is_file()


def record_path(sweep: Path, name: str) -> Path:
    return sweep / RECORDS / f"{name}.json"


def read_record(path: Path) -> Record | None:
    """Read the record of a trial; None if the file is missing, incomplete or contains something else."""
    names = {record_field.name for record_field in fields(Record)}
    try:
        content = parse_json(read_file(path))
        record = Record(**{name: value for name, value in content.items() if name in names})
        return record if _is_record(record) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _is_record(record: Any) -> bool:
    """Return whether the values of a Record have the types that a sweep writes."""
    texts = (record.name, record.status, record.reason, record.place)
    if not all(isinstance(value, str) for value in texts) or "/" in record.name or record.name in ("", ".", ".."):
        return False
    if not isinstance(record.values, dict) or not isinstance(record.objective, dict):
        return False
    numbers = (record.number, record.seconds, record.starts, *record.objective.values())
    if not all(isinstance(value, float) or (type(value) is int and abs(value) < 2**63) for value in numbers):
        return False
    return 0 <= record.seconds < MAX_SECONDS  # which NaN is not


def read_records(sweep: Path) -> list[Record]:
    """Return all trials, by their number."""
    records = [read_record(path) for path in (sweep / RECORDS).glob("*.json")]
    return sorted((record for record in records if record is not None), key=lambda record: (record.number, record.name))


def objectives_of(sweep: Path) -> list[str]:
    """Return the objectives that `sweep.yaml` names; `loss` if it names none or cannot be read."""
    try:
        content = parse_yaml(read_file(sweep / SWEEP_FILE).decode())
        return [str(name) for name in content["objective"]] or ["loss"]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return ["loss"]


def logarithmic_keys(sweep: Path) -> set[str]:
    """Return the keys whose values `sweep.yaml` draws on a logarithmic scale, or lists as a geometric series (8, 16, 32)."""
    try:
        axes = parse_yaml(read_file(sweep / SWEEP_FILE).decode())["axes"]
        return {str(key).lstrip("+") for key, values in axes.items() if _is_logarithmic(values)}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return set()


def _is_logarithmic(values: Any) -> bool:
    if not isinstance(values, list):
        return str(values).startswith("tag(log")
    try:
        numbers = sorted({float(value) for value in values})
    except (TypeError, ValueError):
        return False
    if len(numbers) < 3 or numbers[0] <= 0 or not math.isfinite(numbers[-1]):
        return False
    factors = [above / below for below, above in itertools.pairwise(numbers)]
    return min(factors) > 1.5 and max(factors) < 1.2 * min(factors)


def ranked(records: Sequence[Record], objective: str) -> list[Record]:
    """Sort the best first; a pruned trial behind those that ran to their end, and then those that have no end."""

    def key(record: Record) -> tuple[int, bool, float]:
        rank = 2 if record.status not in FINISHED else 1 if record.status == "pruned" else 0
        return (rank, *best_first(record.objective.get(objective), objective))

    return sorted(records, key=key)


def best_first(value: float | None, objective: str) -> tuple[bool, float]:
    """Return a sort key for the reached values: the best comes first, a missing value last."""
    if value is None:
        return (True, 0.0)
    return (False, value if less_is_better(objective) else -value)


def unbeaten(records: Sequence[Record], objectives: Sequence[str]) -> set[str]:
    """Return the names of the finished trials on the Pareto front, which no other trial beats in all objectives."""
    whole = [
        record
        for record in records
        if record.status in ("completed", "stopped") and set(objectives) <= set(record.objective)
    ]
    costs = {record.name: tuple(best_first(record.objective[name], name)[1] for name in objectives) for record in whole}

    def beaten(name: str) -> bool:
        trial_costs = costs[name]
        return any(
            all(other_cost <= trial_cost for other_cost, trial_cost in zip(other, trial_costs, strict=True))
            and other != trial_costs
            for other in costs.values()
        )

    return {name for name in costs if not beaten(name)}


# ---- the results of a trial ----


def reached(
    result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], objectives: Sequence[str], *, of_best: bool
) -> dict[str, float]:
    """Return the value of each objective that a run has: of the last evaluation, or of the best one.

    result: its result.json. rows: those of its metrics.jsonl. of_best: whether its best weights are what it exports.
    """
    evaluated: Mapping[str, Any] = result.get("eval_final") or {}
    best = result.get("best")
    if of_best and isinstance(best, dict):
        at_best = [row for row in rows if row["step"] == best.get("step") and f"eval/{best.get('metric')}" in row]
        if at_best:
            evaluated = {name.removeprefix("eval/"): value for name, value in at_best[-1].items()}
    objective_values = {}
    for name in objectives:
        if name == TRAINING_LOSS:
            value = _training_loss(rows)
        else:
            value = result.get(name) if name in COSTS else evaluated.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            objective_values[name] = float(value)
    return objective_values


def _training_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), (int, float))]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else None


def with_outcome(
    record: Record,
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    objectives: Sequence[str],
    of_best: bool,
) -> Record:
    """Return `record` with the outcome of its run, if no sweep recorded it (jobs of an array, a sweep that was killed)."""
    status = str(result.get("status") or "")
    if record.status != "running" or not status:
        return record
    objective_values = reached(result, rows, objectives, of_best=of_best) if status in FINISHED else {}
    return ended_unwatched(record, status, result, objective_values)


def ended_unwatched(
    record: Record, status: str, result: Mapping[str, Any], objective_values: Mapping[str, float]
) -> Record:
    """Return the record of a trial that ended while no sweep watched it. result: its result.json."""
    seconds_of_run = valid_seconds(result.get("seconds")) or 0.0  # of all its launches
    return replace(
        record,
        status=status,
        reason=str(result.get("reason") or ""),
        objective=dict(objective_values),
        seconds=round(max(record.seconds, seconds_of_run), 1),
    )


def valid_seconds(value: Any) -> float | None:
    """Return `value` if it is a number of seconds that a clock can show, otherwise None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < MAX_SECONDS else None
