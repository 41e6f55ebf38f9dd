"""`trainer.micro_batch_size=auto`: how many rows a micro-batch has, measured before the first step.

Windows of the longest rows are computed in sizes that double, as training would, and left out like the window of a loss spike:
weights, optimizer and the order of the data stay as they are. A size is tried only where a line through the memory of the
sizes before it says that it fits, so none runs out of memory to find out that it does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from dstune.config.schema import Measured, RunConfig
from dstune.data.batches import batch_of
from dstune.data.prepared import PreparedData, Split
from dstune.data.sampler import MicroBatch
from dstune.dist import World
from dstune.models.heads import Head
from dstune.planning.host import available_bytes
from dstune.train.memory import GIB, PeakMemory
from dstune.train.state import TrainState
from dstune.train.supply import order_of
from dstune.train.window import joined
from dstune.zero.engine import Engine

LEFT_FREE = 0.1
"""Share of the memory that no size may take: evaluation and saves come later, and an allocator leaves gaps."""
GAIN = 1.03
"""A size is worth its memory where it is at least so much faster than half of it: times of a step differ by 1 to 2%."""
NAME = "micro_batch"
"""In `TrainState.extra` and `result.json`."""


@dataclass(frozen=True)
class Trial:
    """What one size takes on the rank that takes most, and how fast the slowest one is."""

    rows: int
    gib: float
    rows_per_second: float


@dataclass(frozen=True)
class Choice:
    rows: int
    trials: tuple[Trial, ...]
    ended: str
    """Why no larger size was tried or taken."""


def choose(trial: Callable[[int], Trial], share: int, at_rest_gib: float, room_gib: float) -> Choice:
    """The fastest size that fits, at most `share` (a rank's rows of a window).

    at_rest_gib: memory before the first trial. room_gib: what a rank may take at most.
    """
    trials: list[Trial] = []
    best, size, ended = 1, 1, ""
    while True:
        done = trial(size)
        trials.append(done)
        if len(trials) > 1 and done.rows_per_second < GAIN * trials[-2].rows_per_second:
            ended = f"{size} are hardly faster"
            break
        best = size
        if size >= share:
            ended = "more than a rank has in a step"
            break
        size = min(2 * size, share)
        expected = foreseen(trials, size, at_rest_gib)
        if expected > room_gib:
            ended = f"{size} would take about {expected:.1f} GiB"
            break
    # As many micro-batches as with `best`, of equal size: 12 rows make two of 6, not one of 8 and one of 4.
    count = -(-share // best)
    return Choice(-(-share // count), tuple(trials), ended)


def foreseen(trials: Sequence[Trial], rows: int, at_rest_gib: float) -> float:
    """GiB of so many rows, by the line through the last two trials; through the first one, and nothing at rest."""
    last = trials[-1]
    before, below = (trials[-2].gib, trials[-2].rows) if len(trials) > 1 else (at_rest_gib, 0)
    return last.gib + max(0.0, last.gib - before) / (last.rows - below) * (rows - last.rows)


def with_measured(
    config: RunConfig,
    data: PreparedData,
    engine: Engine,
    head: Head,
    world: World,
    pad_token_id: int,
    memory: PeakMemory,
    state: TrainState,
    say: Callable[[str], None],
) -> RunConfig:
    """`config` with a number for `trainer.micro_batch_size`, the same on all ranks, which is remembered in `state`.

    A run that is continued on as many ranks keeps its number, since dropout depends on it.
    """
    if config.trainer.micro_batch_size is not Measured.auto:
        return config
    known = state.extra.get(NAME)
    if known is None or known["world_size"] != world.size:
        share = -(-config.trainer.global_batch_size // world.size)
        sizes = Sizes(config, data.train, engine, head, world, pad_token_id, memory, share)
        at_rest, room = memory.now_gib, room_gib(engine.device, world, memory)
        at_rest, room = float(world.gather_numbers([at_rest]).max()), float(world.gather_numbers([room]).min())
        choice = choose(sizes.trial, share, at_rest, room)
        known = {"rows": choice.rows, "world_size": world.size, "trials": [asdict(trial) for trial in choice.trials]}
        state.extra[NAME] = known
        say(told(choice, room))
    return replace(config, trainer=replace(config.trainer, micro_batch_size=int(known["rows"])))


def told(choice: Choice, room: float) -> str:
    speeds = ", ".join(
        f"{trial.rows}: {trial.rows_per_second:.3g} rows/s in {trial.gib:.2f} GiB" for trial in choice.trials
    )
    rows = f"{choice.rows} row{'s' * (choice.rows > 1)}"
    return f"micro-batches of {rows} (a rank at a time has {speeds}; {choice.ended}; {room:.1f} GiB may be taken)"


def room_gib(device: torch.device, world: World, memory: PeakMemory) -> float:
    """What this rank's peak may be."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (1 - LEFT_FREE) * (free + torch.cuda.memory_reserved(device)) / GIB
    return (1 - LEFT_FREE) * (available_bytes() / world.local_size / GIB + memory.now_gib)


class Sizes:
    """Tries sizes of a micro-batch on the longest rows of the training data."""

    def __init__(
        self,
        config: RunConfig,
        split: Split,
        engine: Engine,
        head: Head,
        world: World,
        pad_token_id: int,
        memory: PeakMemory,
        share: int,
    ):
        self._config, self._split, self._engine, self._head, self._world = config, split, engine, head, world
        self._pad_token_id, self._memory, self._share = pad_token_id, memory, share
        self._rows = longest_rows(config, split, share)

    def trial(self, rows: int) -> Trial:
        """Every rank must call it with the same size."""
        # A second micro-batch, where the run has one, meets the sum of gradients that the first one has left.
        count = 2 if rows < self._share else 1
        batches = [self._batch(number, rows) for number in range(count)]
        with self._memory.apart() as peak:
            seconds = min(self._pass(batches) for _ in range(2))  # the first one meets empty caches
            gib = peak() + self._engine.states_to_come / GIB
        numbers = self._world.gather_numbers([gib, seconds])
        return Trial(rows, round(float(numbers[:, 0].max()), 4), round(count * rows / float(numbers[:, 1].max()), 4))

    def _batch(self, number: int, rows: int) -> dict[str, torch.Tensor]:
        # Round and round where the data has fewer rows.
        chosen = [self._rows[place % len(self._rows)] for place in range(number * rows, (number + 1) * rows)]
        micro_batch = MicroBatch(number * self._world.size + self._world.rank, tuple(chosen))
        batch = batch_of(self._config, self._split, micro_batch, self._pad_token_id)
        return {key: value.to(self._engine.device) for key, value in batch.items()}

    def _pass(self, batches: Sequence[dict[str, torch.Tensor]]) -> float:
        """Seconds of the forward and backward passes of a window that is left out."""
        seeds = list(range(len(batches)))
        self._wait()
        began = time.perf_counter()
        shares = joined(self._head, self._engine, batches, self._world, seeds)
        for position, batch in enumerate(batches):
            torch.manual_seed(seeds[position])
            last = position == len(batches) - 1
            self._engine.accumulate(
                self._head,
                batch | (shares[position] if shares else {}),
                window_weight=1.0,
                last=last,
                veto=leave_out if last else None,
            )
        self._wait()
        seconds = time.perf_counter() - began
        self._engine.update()
        return seconds

    def _wait(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)


def leave_out(loss_sum: torch.Tensor) -> bool:
    return True


def longest_rows(config: RunConfig, split: Split, share: int) -> list[tuple[int, ...]]:
    """Two micro-batches' worth of the rows that take the most memory: packed ones are all about full."""
    count = 2 * share
    if config.data.packing:
        one_by_one = replace(config, trainer=replace(config.trainer, micro_batch_size=1))
        order = order_of(one_by_one, split)
        windows = min(order.windows(0), -(-count // config.trainer.global_batch_size))
        rows = [row for index in range(windows) for batch in order.window(0, index).micro_batches for row in batch.rows]
        if rows:
            return sorted(rows, key=lambda row: -sum(int(split.lengths[sample]) for sample in row))[:count]
    return [(int(sample),) for sample in np.argsort(-split.lengths.astype(np.int64), kind="stable")[:count]]
