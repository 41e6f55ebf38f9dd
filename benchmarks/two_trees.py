"""Two checkouts of dstune train one job each and take turns: what the changes between them cost a step.

    python benchmarks/two_trees.py OLD NEW                                 # SmolLM2, full, 128 tokens a step, 1 rank
    python benchmarks/two_trees.py OLD NEW --method lora --model PATH --turn 20 --steps 500 --rounds 8

Both runs live at the same time, and one of them is always stopped (SIGSTOP): a machine that slows down for a minute slows both. A
turn lasts until `--turn` more steps are in the run's metrics.jsonl. The run that starts first is a little slower, so half of
the rounds start NEW first. Reported is the ratio new / old of the two turns of a pair, of time on the wall
and of processor time of all the run's processes, which others change less; its median has a 95% interval by resampling of the
pairs. A ratio of 1.01 means that a step of NEW takes 1% longer. Both trees are read in place;
packages are those of the interpreter that runs this.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from contenders import Job

UNTIMED = 4
"""Steps of each side before its first turn."""


class Ended(Exception):
    """A run is over; the message is its log's end."""


@dataclass(frozen=True)
class Turn:
    """Seconds of a step, mean of one turn."""

    wall: float
    processor: float


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
        """Run until that many more steps are recorded. Raises: Ended when the run ends first."""
        started, processor, began = self._steps(), self._processor(), time.perf_counter()
        self._signal(signal.SIGCONT)
        while (done := self._steps() - started) < steps:
            if self._launcher.poll() is not None:
                raise Ended(self._log.read_text()[-2000:])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--method", choices=["full", "lora"], default="full")
    parser.add_argument("--model", type=Path, help="a folder of weights in place of SmolLM2")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--turn", type=int, default=2, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of fresh runs, an even number")
    options = parser.parse_args()
    if options.rounds < 2 or options.rounds % 2:
        parser.error("--rounds is an even number from 2 on")
    job = Job(options.method, precision="fp32", ranks=options.ranks, length=options.length, rows=1, steps=options.steps)
    overrides = job.overrides() + ([f"model.path={options.model.resolve()}"] if options.model else [])
    trees = {"old": options.old.resolve(), "new": options.new.resolve()}
    rounds = [["old", "new"], ["new", "old"]] * (options.rounds // 2)
    turns = (options.steps - UNTIMED) // options.turn
    pairs = [
        pair
        for names in rounds
        for pair in measured({name: trees[name] for name in names}, overrides, turns, options.turn)
    ]
    print(f"{options.method}, {options.ranks} ranks, {options.length} tokens a row, {len(pairs)} pairs of turns")
    for name in ("wall", "processor"):
        print(described(name, [(getattr(old, name), getattr(new, name)) for old, new in pairs]))


def measured(trees: dict[str, Path], overrides: list[str], turns: int, steps: int) -> list[tuple[Turn, Turn]]:
    """(old, new) of each pair of turns of two fresh runs, started in the order of `trees`."""
    folder = Path(tempfile.mkdtemp(prefix="dstune-benchmark-"))
    sides: dict[str, Side] = {}
    try:
        for name, tree in trees.items():
            sides[name] = Side(tree, overrides, folder / name)
            sides[name].turn(UNTIMED)
        return take_turns([sides["old"], sides["new"]], turns, steps)
    finally:
        for side in sides.values():
            side.end()
        shutil.rmtree(folder, ignore_errors=True)


def take_turns(sides: list[Side], number: int, steps: int) -> list[tuple[Turn, Turn]]:
    """(old, new) of each pair; who goes first changes from pair to pair. It stops where one of the runs ends."""
    pairs = []
    for index in range(number):
        turns: dict[int, Turn] = {}
        try:
            for position in (0, 1) if index % 2 == 0 else (1, 0):
                turns[position] = sides[position].turn(steps)
        except Ended as error:
            if not pairs:
                raise SystemExit(str(error)) from None
            break
        pairs.append((turns[0], turns[1]))
    return pairs


def described(name: str, pairs: list[tuple[float, float]]) -> str:
    ratios = [new / old for old, new in pairs]
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2000))
    old, new = (statistics.median(side) for side in zip(*pairs, strict=True))
    total = sum(new for _, new in pairs) / sum(old for old, _ in pairs)
    return (
        f"{name}: {old:.4f} s a step (old), {new:.4f} s (new), ratio {statistics.median(ratios):.4f} "
        f"[{medians[50]:.4f}, {medians[-51]:.4f}], of the sums {total:.4f}"
    )


if __name__ == "__main__":
    main()
