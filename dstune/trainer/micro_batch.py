"""`trainer.micro_batch_size=auto`: measures, before the first step, how many rows a micro-batch should have.

Each trial is a training step over the heaviest rows, with twice as many rows as the trial before. It is vetoed like the step of
a loss spike, so weights, optimizer and the order of the data do not change. The peak of one size bounds the peak of the next
(`bound_peak_gib`); a size is tried only if that bound is below the limit, so no trial should run out of memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dstune.config.schema import Automatic, RunConfig
from dstune.core.distributed import World
from dstune.data.batches import batch_of
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch, Row
from dstune.models.heads import Head, on_device
from dstune.models.heads.base import indexed
from dstune.planning.host import available_bytes
from dstune.protocols import task_of
from dstune.protocols.task_options import NeedsReference
from dstune.trainer.data_loader import order_of
from dstune.trainer.memory import GIB, PeakMemory
from dstune.trainer.whole_batch import joined
from dstune.zero import accelerator
from dstune.zero.engine import Engine

LEFT_FREE = 0.1
"""Share of the memory that stays free: trials have no optimizer step, evaluation or save, and an allocator leaves gaps."""
GAIN = 1.03
"""A size has to be faster than the best smaller one by this factor; less is noise."""
PATIENCE = 2
"""The search ends after this many sizes without a gain. One is not enough, since something else may have disturbed it."""
NAME = "micro_batch"
"""Key of the choice in `TrainState.results` and `result.json`."""


@dataclass(frozen=True)
class Trial:
    """Peak memory of one size on the rank that needs most, and the speed of the slowest rank."""

    rows: int
    gib: float
    rows_per_second: float
    """Corrected for padding: the heaviest rows are equally long, but usually rows are padded to the longest in a micro-batch."""


@dataclass(frozen=True)
class Choice:
    rows: int
    trials: tuple[Trial, ...]
    end_reason: str
    """Why no larger size was tried or chosen."""


def choose(trial: Callable[[int], Trial | None], share: int, held_gib: float, headroom_gib: float) -> Choice:
    """Choose the fastest size that fits, at most `share` (a rank's rows of a step). One row is always accepted.

    trial: returns None for a size that ran out of memory. held_gib: memory in use when a micro-batch begins. headroom_gib: limit
    of a rank's peak.
    """
    first = trial(1)
    assert first is not None, "an error with one row is raised, not returned"
    best = last = first
    trials, size, without_gain = [best], 1, 0
    while True:
        if size >= share:
            end_reason = "a rank has no more rows in a step"
            break
        size = min(2 * size, share)
        if (expected_gib := bound_peak_gib(last, size, held_gib)) > headroom_gib:
            end_reason = f"{size} might take {expected_gib:.1f} GiB"
            break
        measured = trial(size)
        if measured is None:
            end_reason = f"{size} ran out of memory, though at most {expected_gib:.1f} GiB were expected"
            break
        last = measured
        trials.append(last)
        if last.gib > headroom_gib:
            end_reason = f"{size} took {last.gib:.1f} GiB"
            break
        if last.rows_per_second >= GAIN * best.rows_per_second:
            best, without_gain = last, 0
        else:
            without_gain += 1
        if without_gain == PATIENCE:
            end_reason = "larger ones are hardly faster"
            break
    # Keep the number of micro-batches that `best` needs, but make them equally large: 12 rows are two of 6, not 8 and 4.
    count = -(-share // best.rows)
    return Choice(-(-share // count), tuple(trials), end_reason)


def bound_peak_gib(last: Trial, rows: int, held_gib: float) -> float:
    """Return an upper bound of the peak with `rows`, which are more than in the `last` trial, GiB.

    Memory peaks at one of several moments (the loss, the backward pass, a reduction). Each moment takes a constant of at least
    `held_gib`, plus a part in proportion to the rows. No moment of the last trial was above its peak, so no moment's second part
    was above (last peak - held).
    """
    return held_gib + (last.gib - held_gib) / last.rows * rows


def headroom_gib(device: torch.device, world: World, memory: PeakMemory) -> float:
    """Return the limit of this rank's peak, GiB."""
    if device.type != "cpu":
        free, _ = accelerator.memory(device)
        return (1 - LEFT_FREE) * (free + accelerator.module().memory_reserved(device)) / GIB
    return (1 - LEFT_FREE) * (available_bytes() / world.local_size / GIB + memory.now_gib)


@dataclass(frozen=True)
class Trials:
    """Computes micro-batches of the heaviest training rows, before the first step. Every rank must call its methods alike."""

    config: RunConfig
    split: Split
    engine: Engine
    head: Head
    world: World
    pad_token_id: int
    memory: PeakMemory
    message: Callable[[str], None]

    def choose_micro_batch_size(self, remembered: dict[str, Any] | None) -> tuple[RunConfig, dict[str, Any] | None]:
        """Choose a number for `trainer.micro_batch_size`, the same on all ranks; return the configuration with it, and the record
        of the choice.

        remembered: the record in the checkpoint that the run continues. Its number stays, since dropout and the order of the
        rows may depend on it.
        """
        trainer = self.config.trainer
        if trainer.micro_batch_size is not Automatic.auto:
            return self.config, None
        if remembered is None:
            limit_gib = float(
                self.world.gather_numbers([headroom_gib(self.engine.device, self.world, self.memory)]).min()
            )
            choice = choose(self.run_or_none, self.share, self.held_gib(), limit_gib)
            remembered = {
                "rows": choice.rows,
                "world_size": self.world.size,
                "trials": [asdict(trial) for trial in choice.trials],
            }
            rows = f"{choice.rows} row{'s' * (choice.rows > 1)}"
            self.message(f"chose micro-batches of {rows}: {choice.end_reason} (limit of a rank: {limit_gib:.1f} GiB)")
        return replace(self.config, trainer=replace(trainer, micro_batch_size=int(remembered["rows"]))), remembered

    @property
    def share(self) -> int:
        """A rank's rows of a step."""
        return -(-self.config.trainer.global_batch_size // self.world.size)

    @cached_property
    def heaviest(self) -> list[Row]:
        return heaviest_rows(self.config, self.split, self.share)

    @cached_property
    def lightest(self) -> Row:
        return (int(np.argmin(self.split.lengths)),)

    def held_gib(self) -> float:
        """Measure the memory in use when a micro-batch begins, GiB: weights, optimizer, and the gradients of the previous one."""
        light = self._batch([self.lightest])
        held: list[float] = []
        with self.memory.apart():
            self._timed_step([light, light], after_first=lambda: held.append(self.memory.now_gib))
        return float(self.world.gather_numbers([held[0] + self.engine.unallocated_state_bytes / GIB]).max())

    def run_or_none(self, rows: int) -> Trial | None:
        """Call `run`; return None if memory ran out.

        With several ranks the error ends the run instead, since the other ranks wait in a collective; so it does at stage 3, where
        weights are left half gathered.
        """
        try:
            return self.run(rows)
        except Exception as error:  # see `accelerator.out_of_memory`
            if rows == 1 or self.world.size > 1 or self.engine.stage == 3 or not accelerator.out_of_memory(error):
                raise
        # After the handler: until it ends, the exception's traceback keeps the tensors alive.
        self.engine.forget_micro_batch()
        self._timed_step([self._batch([self.lightest])])
        gc.collect()
        if accelerator.present():
            accelerator.module().empty_cache()
        return None

    def run(self, rows: int) -> Trial:
        """Measure micro-batches of `rows` rows. Rows are repeated if the data has too few."""
        heavy = self._batch([self.heaviest[place % len(self.heaviest)] for place in range(rows)])
        # Only the middle two are timed. The first one fills caches and allocates gradients. The last one ends the step: at ZeRO 0
        # and 1 it has all of the communication, which happens once a step whatever the size.
        batches = [heavy, heavy, heavy, self._batch([self.lightest])]
        with self.memory.apart() as peak:
            times = self._timed_step(batches)
            gib = peak() + self.engine.unallocated_state_bytes / GIB
        numbers = self.world.gather_numbers([gib, min(times[1:3])])
        speed = rows / float(numbers[:, 1].max()) * self._without_padding(rows)
        trial = Trial(rows, round(float(numbers[:, 0].max()), 4), round(speed, 4))
        size = f"{rows} row{'s' * (rows > 1)}"
        self.message(f"trying micro-batches of {size}: {speed:.3g} rows/s, peak {trial.gib:.2f} GiB")
        return trial

    def _batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        split = self.split
        task = task_of(self.config.task)
        if isinstance(task, NeedsReference) and task.caches_reference(self.config) and split.reference is None:
            # The reference is computed later, with the chosen size.
            split = replace(split, reference=np.zeros((len(split.table), 2), dtype=np.float32))
        batch = batch_of(self.config, split, MicroBatch(0, tuple(rows)), self.pad_token_id)
        return on_device(indexed(self.head, batch), self.engine.device)

    def _timed_step(
        self, batches: Sequence[dict[str, torch.Tensor]], after_first: Callable[[], None] | None = None
    ) -> list[float]:
        """Run a step that is vetoed; return the seconds of the forward and backward pass of each batch."""
        seeds, times = list(range(len(batches))), []
        whole_batch_inputs = joined(self.head, self.engine, batches, self.world, seeds)
        for position, batch in enumerate(batches):
            is_last = position == len(batches) - 1
            torch.manual_seed(seeds[position])
            self._synchronize()
            began = time.perf_counter()
            self.engine.accumulate(
                self.head,
                batch | (whole_batch_inputs[position] if whole_batch_inputs else {}),
                batch_weight=1.0,
                last=is_last,
                veto=veto_always if is_last else None,
            )
            self._synchronize()
            times.append(time.perf_counter() - began)
            if position == 0 and after_first is not None:
                after_first()
        self.engine.update()
        return times

    def _synchronize(self) -> None:
        if self.engine.device.type != "cpu":
            accelerator.synchronize()

    def _without_padding(self, rows: int) -> float:
        """Return the fraction of positions that are not padding, over the micro-batches of an epoch with this size."""
        if self.config.data.packing:
            return 1.0  # packed rows are nearly full at any size
        resized = replace(self.config, trainer=replace(self.config.trainer, micro_batch_size=rows))
        order = order_of(resized, self.split)
        return order.efficiency() if order.steps_in(0) else 1.0


def veto_always(loss_sum: torch.Tensor) -> bool:
    return True


def heaviest_rows(config: RunConfig, split: Split, count: int) -> list[Row]:
    """Return at most `count` rows that together need the most memory: the longest row in each column of tokens, to whose length
    a batch pads the others, then the rows with the most targets."""
    samples = np.arange(len(split.lengths))
    starts = np.arange(len(samples) + 1)
    if config.data.packing:
        order = order_of(config, split)
        if order.steps_in(0):
            samples, starts = order.rows(0)
    longest = [int(np.argmax(np.add.reduceat(tokens[samples], starts[:-1]))) for tokens in split.tokens().values()]
    targets = np.add.reduceat(split.weights[samples], starts[:-1])
    chosen = dict.fromkeys([*longest, *np.argsort(-targets, kind="stable")[:count].tolist()])
    return [tuple(samples[starts[row] : starts[row + 1]].tolist()) for row in list(chosen)[:count]]
