"""Where the steps of the loop come from: prepared data that is there as a whole, or a stream of prepared blocks."""

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
from dstune.data.prepared import PreparedData, Split
from dstune.data.repeats import Repeats
from dstune.data.sampler import TrainingOrder, Window


@dataclass(frozen=True)
class Draw:
    """The micro-batches of one optimizer step."""

    split: Split
    """What the sample numbers in `window` mean."""
    window: Window
    epoch: float
    """Passes over the training rows that are done after it."""


class Supply(Protocol):
    """The same on every rank. Steps count from 0: those of the data, which run ahead of the optimizer's where data was
    left out (`TrainState.window`)."""

    def steps(self, epochs: int) -> int:
        """Optimizer steps in `epochs` passes over the rows."""

    def draw(self, step: int) -> Draw:
        """The global batch of `step`; requested in rising order, by one thread."""

    def may_wait(self, step: int) -> bool:
        """Whether `draw(step)` may take any time; asked when all steps before it are drawn."""

    def begin(self, step: int) -> None:
        """All ranks are done with the steps before `step`."""

    def cursor(self, step: int) -> dict[str, Any] | None:
        """What a checkpoint has to remember beside the number of steps to go on with `step`; None for nothing."""

    def interrupt(self) -> None:
        """Nothing more will be drawn: let a `draw` that waits raise."""

    def close(self, *, for_good: bool) -> None:
        """The loop is over; `for_good` where the run will not be continued."""


def order_of(config: RunConfig, split: Split) -> TrainingOrder:
    """The global order of training samples: the same on every rank and for any number of them."""
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
    )


class Whole:
    """Samples that are all there; every epoch is another order of them.

    Raises UserError where the weights of a mixture leave no sample in the epochs asked for.
    """

    def __init__(self, config: RunConfig, data: PreparedData):
        self._split = data.train
        self._order = order_of(config, data.train)
        if config.trainer.max_steps is None and self.steps(config.trainer.epochs) == 0:
            weights = {name: source.weight for name, source in config.data.mixture.items()}
            reason = (
                f"with these weights no sample comes in {config.trainer.epochs} epochs of {len(data.train.lengths)}"
            )
            raise UserError(Problem("data.mixture", reason, "larger weights, or more trainer.epochs", str(weights)))

    def steps(self, epochs: int) -> int:
        return self._order.steps(epochs)

    def draw(self, step: int) -> Draw:
        epoch, index = self._order.locate(step)
        window = self._order.window(epoch, index)
        return Draw(self._split, window, epoch + (index + 1) / self._order.windows(epoch))

    def may_wait(self, step: int) -> bool:
        return False

    def begin(self, step: int) -> None: ...

    def cursor(self, step: int) -> dict[str, Any] | None:
        return None

    def interrupt(self) -> None: ...

    def close(self, *, for_good: bool) -> None: ...


@dataclass(frozen=True)
class _Stretch:
    """The steps that one block serves."""

    passed: int
    """Number of the first of the empty blocks before it, or of the block itself."""
    block: Block
    order: TrainingOrder
    first_step: int
    windows: int

    @property
    def end(self) -> int:
        return self.first_step + self.windows


class Streamed:
    """Blocks of a stream, one after the other; the block's number takes the place of the epoch's.

    `draw` runs ahead of the loop, so the blocks in use are those from the loop's step to the drawn one.
    cursor: of the checkpoint that the run continues. Raises UserError where the rows behind it have changed.
    """

    def __init__(self, config: RunConfig, blocks: Blocks, cursor: dict[str, Any] | None):
        self._config = config
        self._blocks = blocks
        self._lock = threading.Lock()
        start = cursor or {"block": 0, "first_step": 0, "begin": None}
        block = blocks.get(start["block"], start["begin"])
        if start.get("digest", block.digest) != block.digest:
            reason = f"the rows of block {block.number} are not those that the checkpoint was written with"
            fix = "bring back the rows, or start another run with run.dir"
            raise UserError(Problem("data.train", reason, fix, str(config.data.train)))
        self._cursor = cursor
        self._total_steps: float = config.trainer.max_steps or 0
        if config.trainer.spike.action is SpikeAction.rollback:
            self._total_steps = math.inf  # data that is left out is replaced by what comes after
        self._stretches = [self._stretch(block, start["first_step"])]
        self._announced: int | None = None

    def _stretch(self, block: Block, first_step: int) -> _Stretch:
        passed = block.number
        while not len(block.split.lengths):  # nothing but held-out, cleaned or bad rows
            block = self._blocks.get(block.number + 1, block.end)
        order = order_of(self._config, block.split)
        return _Stretch(passed, block, order, first_step, order.windows(block.number))

    def steps(self, epochs: int) -> int:
        raise AssertionError("a stream's length is trainer.max_steps")

    def draw(self, step: int) -> Draw:
        last = self._stretches[-1]
        if step == last.end:
            last = self._stretch(self._blocks.get(last.block.number + 1, last.block.end), step)
            with self._lock:
                self._stretches.append(last)
        assert last.first_step <= step < last.end, f"step {step} was asked for after {last.first_step}"
        done = (step + 1 - last.first_step) / last.windows
        begin, end = last.block.passes
        window = last.order.window(last.block.number, step - last.first_step)
        return Draw(last.block.split, window, begin + done * (end - begin))

    def may_wait(self, step: int) -> bool:
        with self._lock:
            return any(stretch.end == step for stretch in self._stretches)

    def begin(self, step: int) -> None:
        with self._lock:
            self._stretches = [stretch for stretch in self._stretches if stretch.end > step]
            passed, block = self._stretches[0].passed, self._stretches[0].block
        if block.number != self._announced:
            self._announced = block.number
            # The block behind the last one of the run is not prepared. Another rank may still be passing the empty ones.
            self._blocks.keep_from(passed, block, ahead=self._stretches[-1].end < self._total_steps)

    def cursor(self, step: int) -> dict[str, Any] | None:
        with self._lock:
            stretch = next((one for one in self._stretches if one.first_step < step <= one.end), None)
        if stretch is None:  # no step was done since the checkpoint
            return self._cursor
        block = stretch.block
        if step == stretch.end:
            return {"block": block.number + 1, "first_step": step, "begin": block.end}
        return {
            "block": block.number,
            "first_step": stretch.first_step,
            "begin": block.begin,
            "digest": block.digest,
        }

    def interrupt(self) -> None:
        self._blocks.interrupt()

    def close(self, *, for_good: bool) -> None:
        self._blocks.close(remove=for_good)


def supply_of(config: RunConfig, data: PreparedData, blocks: Blocks | None, cursor: dict[str, Any] | None) -> Supply:
    """`cursor` is that of the checkpoint which the run continues, None at step 0."""
    return Whole(config, data) if blocks is None else Streamed(config, blocks, cursor)
