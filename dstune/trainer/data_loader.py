"""Loads the loop's global batches, either from completely prepared data or from a stream of prepared blocks."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dstune.config.schema import RunConfig, SpikeAction
from dstune.core.errors import Problem, UserError
from dstune.data.blocks import Block, Blocks
from dstune.data.mixture import source_weights
from dstune.data.order_file import read_order
from dstune.data.prepared import PreparedData, Split
from dstune.data.repeats import Repeats
from dstune.data.sampler import GlobalBatch, TrainingOrder, WrittenOrder


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one optimizer step."""

    split: Split
    """The split that the sample numbers in `global_batch` refer to."""
    global_batch: GlobalBatch
    epoch: float
    """Passes over the training rows that are completed with this step."""


class DataLoader(Protocol):
    """Loads the global batches, which are the same on every rank.

    A `step` here is the number of a global batch, from 0 on. It is ahead of the optimizer's step once a rewind has left data out
    (`TrainState.next_batch`).
    """

    def steps(self, epochs: int) -> int:
        """Return the optimizer steps in `epochs` passes over the rows."""

    def rows(self) -> int | None:
        """Count the rows of the first pass as the model sees them: with packing, a row has several samples. None for a stream."""

    def load(self, step: int) -> StepBatch:
        """Load the global batch of `step`; requested in rising order, by one thread."""

    def may_wait(self, step: int) -> bool:
        """Return whether `load(step)` may block for long. Call it once all earlier steps are loaded."""

    def begin(self, step: int) -> None:
        """Release the steps before `step`, which all ranks have finished."""

    def cursor(self, step: int) -> dict[str, Any] | None:
        """Return what a checkpoint must store, besides the number of steps, to continue with `step`; None if nothing."""

    def interrupt(self) -> None:
        """Make a waiting `load` raise, since no further step is needed."""

    def close(self, *, for_good: bool) -> None:
        """Close the loader after the loop. for_good: the run will not be resumed."""


def order_of(config: RunConfig, split: Split) -> TrainingOrder:
    """Return the global order of training samples, which is the same on every rank and for any number of ranks.

    Raises UserError for a wrong line of `data.order`.
    """
    if config.data.order is not None:
        return WrittenOrder(
            split.lengths,
            split.weights,
            read_order(config.data.order, len(split.lengths), config.trainer.global_batch_size),
            micro_batch_size=config.trainer.rows,
            padded=config.data.pads_rows,
        )
    repeats = None
    if split.sources is not None:
        counts = np.bincount(split.sources, minlength=len(config.data.mixture)).tolist()
        weights = source_weights(config, counts)
        repeats = Repeats(split.sources, weights, config.trainer.seed)
    return TrainingOrder(
        split.lengths,
        split.weights,
        micro_batch_size=config.trainer.rows,
        global_batch_size=config.trainer.global_batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        length_grouping=config.trainer.length_grouping,
        seed=config.trainer.seed,
        repeats=repeats,
        padded=config.data.pads_rows,
    )


def refuse_other_numbers(order: str, data: PreparedData) -> None:
    """Raise UserError unless sample N is row N of the file, as the numbers in `order` (`data.order`) have it."""
    rows, samples = data.report["train"]["rows_read"], len(data.train.lengths)
    if rows != samples:
        reason = (
            f"it numbers the rows of the file, and its {rows:,} rows make {samples:,} samples, so the numbers are off"
        )
        fix = (
            "train each row once: data.clean.duplicates=keep, data.split.validation=0 and no other filter that the start "
            "of the run reports; or leave data.order out"
        )
        raise UserError(Problem("data.order", reason, fix, order))


class PreparedLoader:
    """Loads completely prepared samples, in a new order each epoch.

    Raises UserError if the weights of a mixture leave no sample in `trainer.epochs`, or `data.order` does not fit.
    """

    def __init__(self, config: RunConfig, data: PreparedData):
        self._split = data.train
        if config.data.order is not None:
            refuse_other_numbers(config.data.order, data)
        self._order = order_of(config, data.train)
        if config.data.order is not None and config.trainer.max_steps is not None:
            self._order.locate(config.trainer.max_steps - 1)
        if config.trainer.max_steps is None and self.steps(config.trainer.epochs) == 0:
            weights = {name: source.weight for name, source in config.data.mixture.items()}
            size = len(data.train.lengths)
            reason = f"with these weights, {config.trainer.epochs} epochs of {size} samples contain no sample at all"
            raise UserError(Problem("data.mixture", reason, "larger weights, or more trainer.epochs", str(weights)))

    def steps(self, epochs: int) -> int:
        return self._order.steps(epochs)

    def rows(self) -> int:
        return len(self._order.rows(0)[1]) - 1

    def load(self, step: int) -> StepBatch:
        epoch, index = self._order.locate(step)
        global_batch = self._order.global_batch(epoch, index)
        return StepBatch(self._split, global_batch, epoch + (index + 1) / self._order.steps_in(epoch))

    def may_wait(self, step: int) -> bool:
        return False

    def begin(self, step: int) -> None: ...

    def cursor(self, step: int) -> dict[str, Any] | None:
        return None

    def interrupt(self) -> None: ...

    def close(self, *, for_good: bool) -> None: ...


@dataclass(frozen=True)
class _Segment:
    """The steps that one block serves."""

    first_block: int
    """Number of the first of the empty blocks that precede the block; its own number if none do."""
    block: Block
    order: TrainingOrder
    first_step: int
    steps: int

    @property
    def end(self) -> int:
        return self.first_step + self.steps


class StreamingLoader:
    """Loads the blocks of a stream one after the other. A block's number seeds the order of its samples, as the epoch's number
    does for prepared data.

    `load` runs ahead of the loop, so all blocks from the loop's step to the last loaded step are in use.
    cursor: from the checkpoint that the run continues. Raises UserError if the rows of its block have changed.
    """

    def __init__(self, config: RunConfig, blocks: Blocks, cursor: dict[str, Any] | None):
        self._config = config
        self._blocks = blocks
        self._lock = threading.Lock()
        start = cursor or {"block": 0, "first_step": 0, "begin": None}
        block = blocks.get(start["block"], start["begin"])
        if start.get("digest", block.digest) != block.digest:
            reason = f"the rows of block {block.number} have changed since the checkpoint was written"
            fix = "bring back the rows, or start another run with run.dir"
            raise UserError(Problem("data.train", reason, fix, str(config.data.train)))
        self._cursor = cursor
        self._total_steps: float = config.trainer.max_steps or 0
        if config.trainer.spike.action is SpikeAction.rollback:
            self._total_steps = math.inf  # later data replaces what a rewind leaves out
        self._segments = [self._segment(block, start["first_step"])]
        self._announced: int | None = None

    def _segment(self, block: Block, first_step: int) -> _Segment:
        first_block = block.number
        while not len(block.split.lengths):  # all of its rows are held out, cleaned away or bad
            block = self._blocks.get(block.number + 1, block.end)
        order = order_of(self._config, block.split)
        return _Segment(first_block, block, order, first_step, order.steps_in(block.number))

    def steps(self, epochs: int) -> int:
        raise AssertionError("a stream's length is trainer.max_steps")

    def rows(self) -> None:
        return None

    def load(self, step: int) -> StepBatch:
        last = self._segments[-1]
        if step == last.end:
            last = self._segment(self._blocks.get(last.block.number + 1, last.block.end), step)
            with self._lock:
                self._segments.append(last)
        assert last.first_step <= step < last.end, f"step {step} was requested after {last.first_step}"
        done = (step + 1 - last.first_step) / last.steps
        begin, end = last.block.passes
        global_batch = last.order.global_batch(last.block.number, step - last.first_step)
        return StepBatch(last.block.split, global_batch, begin + done * (end - begin))

    def may_wait(self, step: int) -> bool:
        with self._lock:
            return any(segment.end == step for segment in self._segments)

    def begin(self, step: int) -> None:
        with self._lock:
            self._segments = [segment for segment in self._segments if segment.end > step]
            first_block, block = self._segments[0].first_block, self._segments[0].block
        if block.number != self._announced:
            self._announced = block.number
            # Empty blocks are kept too, since another rank may still be skipping them. No block is prepared after the run's last.
            self._blocks.keep_from(first_block, block, ahead=self._segments[-1].end < self._total_steps)

    def cursor(self, step: int) -> dict[str, Any] | None:
        with self._lock:
            segment = next(
                (candidate for candidate in self._segments if candidate.first_step < step <= candidate.end), None
            )
        if segment is None:  # no step was done since the checkpoint was loaded
            return self._cursor
        block = segment.block
        if step == segment.end:
            return {"block": block.number + 1, "first_step": step, "begin": block.end}
        return {"block": block.number, "first_step": segment.first_step, "begin": block.begin, "digest": block.digest}

    def interrupt(self) -> None:
        self._blocks.interrupt()

    def close(self, *, for_good: bool) -> None:
        self._blocks.close(remove=for_good)


def data_loader_of(
    config: RunConfig, data: PreparedData, blocks: Blocks | None, cursor: dict[str, Any] | None
) -> DataLoader:
    """Make the loader of a run. cursor: from the checkpoint that the run continues, None at step 0."""
    return PreparedLoader(config, data) if blocks is None else StreamingLoader(config, blocks, cursor)
