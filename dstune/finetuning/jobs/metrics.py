"""Reads `metrics.jsonl` of a job's run into events, checkpoints' metrics and the results file."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.core.parsing import parse_json

ROUNDING = 1e-9
NAMES = {
    "loss": "train_loss",
    "reward_accuracy": "train_reward_accuracy",
    "reward_margin": "train_reward_margin",
    "eval/loss": "full_valid_loss",
    "eval/token_accuracy": "full_valid_mean_token_accuracy",
    "eval/reward_accuracy": "full_valid_reward_accuracy",
    "eval/reward_margin": "full_valid_reward_margin",
    "reward": "train_mean_reward",
    "eval/reward": "full_valid_mean_reward",
    "completions/mean_length": "completion_tokens_mean",
}
"""The API's names of a row's values."""
MOST_EVENTS = 5000
"""Most step events of a job. A longer job's events are thinned out; its results file has all steps."""
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass
class Step:
    """One optimizer step, and the evaluation after it."""

    number: int
    epoch: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    """Values by the API's names."""
    tokens: int | None = None
    seconds: float | None = None

    @property
    def ends_epoch(self) -> bool:
        return self.epoch > 0 and abs(self.epoch - round(self.epoch)) < ROUNDING


class Reader:
    """Reads new lines. A file that became shorter, because the run continued from a checkpoint, is read from its beginning."""

    def __init__(self, file: Path):
        self._file = file
        self._at, self._inode, self._newest = 0, 0, 0
        self.steps: dict[int, Step] = {}

    def read(self) -> list[Step]:
        """Return all steps in order. An incomplete last line is left for the next call."""
        try:
            with self._file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                if status.st_size < self._at or status.st_ino != self._inode:
                    self._at, self._newest, self.steps = 0, 0, {}
                self._inode = status.st_ino
                stream.seek(self._at)
                data = stream.read()
        except OSError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._at += len(complete)
        for line in complete.splitlines():
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                self._note(row)
        return [self.steps[number] for number in sorted(self.steps)]

    def _note(self, row: Mapping[str, Any]) -> None:
        number = row.get("step")
        if not isinstance(number, int) or number < 1:
            return
        if "loss" in row and number <= self._newest:
            # The run continued from an earlier checkpoint, so steps written after it by the previous attempt repeat.
            self.steps = {earlier: step for earlier, step in self.steps.items() if earlier < number}
        self._newest = max(number, self._newest) if "loss" not in row else number
        step = self.steps.setdefault(number, Step(number))
        for name, public in NAMES.items():
            value = row.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                step.values[public] = float(value)
        if "loss" in row:
            step.epoch = float(row.get("epoch") or 0.0)
            step.tokens = row.get("tokens")
            step.seconds = row.get("step_seconds")


def steps_of(run: Path) -> list[Step]:
    return Reader(run / "metrics.jsonl").read()


def epoch_ends(run: Path) -> list[int]:
    return [step.number for step in steps_of(run) if step.ends_epoch]


def steps_per_epoch(steps: Iterable[Step]) -> int | None:
    """Return the steps per epoch as the run reports them. They do not follow from the rows: some templates turn a conversation into
    several samples."""
    for step in steps:
        if step.epoch > 0:
            return max(1, round(step.number / step.epoch))
    return None


def becomes_event(step: int, total: int, *, ends_epoch: bool) -> bool:
    """Return whether a step becomes an event: every step, or for a long job every n-th and the ends of epochs."""
    every = -(-total // MOST_EVENTS)
    return every <= 1 or step % every == 0 or ends_epoch or step == total


def message_of(step: Step, total: int) -> str:
    """Return the message of a step's event in the form of the hosted API."""
    if "train_mean_reward" in step.values:
        text = f"Step {step.number}/{total} , train mean reward={step.values['train_mean_reward']:.2f}"
        if "full_valid_mean_reward" in step.values:
            text += f", full validation mean reward={step.values['full_valid_mean_reward']:.2f}"
        return text
    text = f"Step {step.number}/{total}: training loss={step.values.get('train_loss', float('nan')):.2f}"
    if "full_valid_loss" in step.values:
        text += f", full validation loss={step.values['full_valid_loss']:.2f}"
    return text


def data_of(step: Step, total: int) -> dict[str, Any]:
    return {"step": step.number, "total_steps": total, **step.values}


def results_csv(steps: Iterable[Step]) -> bytes:
    """Return the results file: one row per step; cells without a measurement are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in _rows(steps):
        writer.writerow(row)
    return text.getvalue().encode()


def _rows(steps: Iterable[Step]) -> Iterator[tuple[Any, ...]]:
    for step in steps:
        values = step.values
        loss, accuracy = values.get("full_valid_loss", ""), values.get("full_valid_mean_token_accuracy", "")
        yield step.number, values.get("train_loss", ""), "", loss, accuracy
