"""What `throughput.py --against OLD` does: two checkouts of dstune train one job each and take turns.

Both runs live at the same time, and one of them is always stopped (SIGSTOP): a machine that slows down for a minute slows both. A
turn lasts until so many more steps are in the run's metrics.jsonl. The run that starts first can be slower by 8%, all of its
life, so half of the rounds start NEW first, and a figure is the mean of what each round says. Both trees are read in place;
packages are those of the interpreter that runs this.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from contenders import Failed, Job

UNTIMED = 2
"""Steps of each side before its first turn."""


@dataclass(frozen=True)
class Turn:
    """Seconds of a step, mean of one turn."""

    wall: float
    processor: float


Pair = tuple[Turn, Turn]
"""Of the old tree and of the new."""


class Side:
    """One tree's run: its launcher and its ranks are stopped and continued together."""

    def __init__(self, tree: Path, overrides: list[str], folder: Path) -> None:
        self._log = folder / "log"
        self._metrics = folder / "run" / "metrics.jsonl"
        folder.mkdir()
        with self._log.open("w") as output:
            self._launcher = psutil.Popen(
                [sys.executable, "-m", "dstune", "train", *overrides, f"run.dir={folder / 'run'}"],
                cwd=tree,
                env=os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._signal(signal.SIGSTOP)

    def turn(self, steps: int) -> Turn:
        """Run until that many more steps are recorded. Raises: Failed when the run ends first."""
        started, processor, began = self._steps(), self._processor(), time.perf_counter()
        self._signal(signal.SIGCONT)
        while (done := self._steps() - started) < steps:
            if self._launcher.poll() is not None:
                raise Failed(self._log.read_text()[-2000:])
            time.sleep(0.01)
        wall = time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        return Turn(wall / done, (self._processor() - processor) / done)

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self._launcher.wait()

    def _steps(self) -> int:
        if not self._metrics.is_file():
            return 0
        with self._metrics.open() as rows:
            return sum('"step_seconds"' in row for row in rows)

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._launcher, *self._launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: int) -> None:
        for process in self._processes():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def _processor(self) -> float:
        seconds = 0.0
        for process in self._processes():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds += times.user + times.system
        return seconds


def measured(
    trees: tuple[Path, Path], job: Job, overrides_of_all: list[str], turns: int, steps: int, rounds: int
) -> list[list[Pair]]:
    """Return the pairs of turns of `steps` steps of `trees`, old and new: `turns` of each of `rounds` pairs of fresh runs."""
    last = UNTIMED + turns * steps + 1  # a run does not come to its end within its last turn
    overrides = [*replace(job, steps=last).overrides(), *overrides_of_all]
    return [one_round(trees, overrides, turns, steps, number % 2) for number in range(rounds)]


def one_round(trees: tuple[Path, Path], overrides: list[str], turns: int, steps: int, first: int) -> list[Pair]:
    """Run one round of pairs. first: which tree starts first, and has the first turn of the first pair; the other has that of
    the second, ..."""
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    sides: dict[int, Side] = {}
    try:
        for index in (first, 1 - first):
            sides[index] = Side(trees[index], overrides, folder / str(index))
            sides[index].turn(UNTIMED)
        pairs = []
        for number in range(turns):
            leader = (first + number) % 2
            turn = {index: sides[index].turn(steps) for index in (leader, 1 - leader)}
            pairs.append((turn[0], turn[1]))
        return pairs
    finally:
        for side in sides.values():
            side.end()
        shutil.rmtree(folder, ignore_errors=True)


def interval(rounds: list[list[float]]) -> tuple[float, float, float]:
    """Return the geometric mean of the rounds' median ratios, and the ends of its 95% interval by resampling within each round."""
    draws = random.Random(0)
    resampled = ([draws.choices(ratios, k=len(ratios)) for ratios in rounds] for _ in range(2000))
    means = sorted(map(mean_of_medians, resampled))
    return mean_of_medians(rounds), means[50], means[-51]


def mean_of_medians(rounds: list[list[float]]) -> float:
    return statistics.geometric_mean(map(statistics.median, rounds))
