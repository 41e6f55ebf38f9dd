"""Decide which samples make up each optimizer step: a pure function of (seed, epoch), the same for any number of ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np

from dstune.config.schema import RunConfig
from dstune.data.order_file import WrittenSteps
from dstune.data.pack import best_fit, group
from dstune.data.repeats import Repeats

Row = tuple[int, ...]
"""Samples that share one row of the model's input: a single sample without packing, several with it."""

PAD_MULTIPLE = 8
"""Unpacked rows are padded to a multiple of this: fewer distinct shapes, and a multiple that suits tensor cores."""

BUCKET_MICRO_BATCHES = 50
"""Length grouping sorts this many micro-batches together: enough to save padding, few enough to stay random."""


@dataclass(frozen=True)
class MicroBatch:
    index: int
    """Position in the step; rank `index % world` computes it."""
    rows: tuple[Row, ...]
    filler: bool = False
    """Its content does not count: it exists so that all ranks run the same number of micro-batches."""
    needs_image: bool = False
    """The model must be given an image: a blank one if the samples have none."""
    padded: bool = True
    """Without packing: whether rows are padded to a multiple of `PAD_MULTIPLE`; if not, all have the same length."""

    @property
    def samples(self) -> list[int]:
        return [sample for row in self.rows for sample in row]


@dataclass(frozen=True)
class GlobalBatch:
    """The micro-batches of one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    weight: float
    """Targets in all samples of the batch: the summed loss is divided by this."""
    tokens: int
    """Tokens without padding."""


@dataclass(frozen=True)
class _Plan:
    """The rows of one epoch in order: row r holds `samples[starts[r]:starts[r + 1]]`, step s the rows from `steps[s]` to
    `steps[s + 1]`."""

    epoch: int
    samples: np.ndarray
    starts: np.ndarray
    steps: np.ndarray

    def row(self, number: int) -> Row:
        return tuple(self.samples[self.starts[number] : self.starts[number + 1]].tolist())


class TrainingOrder:
    """The order of all samples over all epochs.

    lengths: tokens of each sample, [samples]. weights: targets of each sample (its weight in the loss), [samples].
    A step has `global_batch_size` rows, cut into micro-batches of `micro_batch_size` rows. If the second does not divide the
    first, the last micro-batch of a step is smaller. The last step of an epoch may be short; a step never spans epochs.

    With `packing`, a row holds several samples of at most `max_length` tokens together (best fit). Without it,
    `length_grouping` puts samples of similar length into the same micro-batch. If rows are not `padded`, each step sorts its
    rows by length and starts a new micro-batch whenever the length changes. `repeats` lists the samples of each epoch; without
    it an epoch has every sample once.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        weights: np.ndarray,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        max_length: int,
        packing: bool,
        length_grouping: bool,
        seed: int,
        repeats: Repeats | None = None,
        padded: bool = True,
    ):
        assert len(lengths) == len(weights) > 0, "an order needs samples"
        self._lengths = np.asarray(lengths)
        self._weights = np.asarray(weights)
        self._micro = min(micro_batch_size, global_batch_size)
        self._global = global_batch_size
        self._max_length = max_length
        self._packing = packing
        self._length_grouping = length_grouping
        self._seed = seed
        self._repeats = repeats
        self._padded = padded or packing
        self._constant = repeats is None or repeats.constant
        self._cached: _Plan | None = None
        self._steps_in: dict[int, int] = {}
        self._first_steps = [0]

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps in `epoch`; 0 if the weights of a mixture leave it without samples."""
        # Best fit needs the same number of rows for any order of the same samples.
        cached_epoch = 0 if self._constant else epoch
        if cached_epoch not in self._steps_in:
            self._steps_in[cached_epoch] = -(-self._rows(epoch) // self._global)
        return self._steps_in[cached_epoch]

    def _rows(self, epoch: int) -> int:
        if self._repeats is None or self._packing:
            return len(self._plan(epoch).starts) - 1
        return len(self._repeats.samples(epoch))

    def steps(self, epochs: int) -> int:
        """Return the number of optimizer steps in the first `epochs` epochs."""
        if self._constant:
            return epochs * self.steps_in(0)
        while len(self._first_steps) <= epochs:
            self._first_steps.append(self._first_steps[-1] + self.steps_in(len(self._first_steps) - 1))
        return self._first_steps[epochs]

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of optimizer step `step`, and its index in that epoch; all count from 0."""
        if self._constant:
            return divmod(step, self.steps_in(0))
        while self._first_steps[-1] <= step:
            self.steps(len(self._first_steps))
        epoch = bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def global_batch(self, epoch: int, index: int) -> GlobalBatch:
        """Return global batch `index` of `epoch`; both count from 0."""
        assert 0 <= index < self.steps_in(epoch), f"epoch {epoch} has no global batch {index}"
        plan = self._plan(epoch)
        first, last = plan.steps[index], plan.steps[index + 1]
        rows = [plan.row(row) for row in range(first, last)]
        micro_batches = tuple(_micro_batches(rows, self._micro, self._lengths, padded=self._padded))
        samples = plan.samples[plan.starts[first] : plan.starts[last]]
        # `item` makes a Python number, which JSON can hold: an exact int if the weights are integers.
        return GlobalBatch(micro_batches, self._weights[samples].sum().item(), int(self._lengths[samples].sum()))

    def rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (samples, starts) of this epoch: its row r holds `samples[starts[r]:starts[r + 1]]`, in training order."""
        plan = self._plan(epoch)
        return plan.samples, plan.starts

    def efficiency(self) -> float:
        """Return the share of the first epoch's computed positions that hold a token instead of padding."""
        if not self._padded:
            return 1.0
        plan = self._plan(0)
        row_lengths = np.add.reduceat(self._lengths[plan.samples], plan.starts[:-1])
        rows = len(row_lengths)
        starts = np.concatenate([np.arange(first, last, self._micro) for first, last in pairwise(plan.steps)])
        sizes = np.diff(np.append(starts, rows))
        widths = np.maximum.reduceat(row_lengths, starts)
        if not self._packing:
            widths = -(-widths // PAD_MULTIPLE) * PAD_MULTIPLE
        return float(row_lengths.sum() / (sizes * widths).sum())

    def _plan(self, epoch: int) -> _Plan:
        if self._cached is None or self._cached.epoch != epoch:
            self._cached = self._make_plan(epoch)
        return self._cached

    def _make_plan(self, epoch: int) -> _Plan:
        # numpy keeps the streams of RandomState the same in every version, so a run resumed after an upgrade continues
        # with the same samples.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, epoch])))
        if self._repeats is None:
            shuffled = random.permutation(len(self._lengths))
        else:
            shuffled = random.permutation(self._repeats.samples(epoch))
        if self._packing:
            rows = best_fit(self._lengths[shuffled], self._max_length)
            samples, starts = group(rows)
            order = random.permutation(len(starts) - 1)
            sizes = np.diff(starts)[order]
            new_starts = np.concatenate([[0], np.cumsum(sizes)])
            # Where each sample of the reordered rows lies in `samples`.
            moved = np.repeat(starts[order] - new_starts[:-1], sizes) + np.arange(len(samples))
            return _Plan(epoch, shuffled[samples[moved]], new_starts, self._step_starts(len(sizes)))
        if self._length_grouping:
            shuffled = self._grouped(shuffled, random)
        return _Plan(epoch, shuffled, np.arange(len(shuffled) + 1), self._step_starts(len(shuffled)))

    def _step_starts(self, rows: int) -> np.ndarray:
        """Return the first row of each step of an epoch of `rows` rows, and their number: [steps + 1]."""
        return np.append(np.arange(0, rows, self._global), rows)

    def _grouped(self, shuffled: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        """Return the samples in an order that gives each micro-batch similar lengths.

        The epoch is a row of slots, one for each micro-batch. The shuffled samples are cut into buckets, and each bucket is
        sorted by length and dealt to the next slots in random order, so the lengths still come in random order.
        """
        total = len(shuffled)
        starts = np.concatenate(
            [np.arange(first, min(first + self._global, total), self._micro) for first in range(0, total, self._global)]
        )
        sizes = np.diff(np.append(starts, total))
        slots = random.permutation(len(starts))
        grouped = np.empty_like(shuffled)
        offset = 0
        for first in range(0, len(slots), BUCKET_MICRO_BATCHES):
            bucket_slots = slots[first : first + BUCKET_MICRO_BATCHES]
            count = int(sizes[bucket_slots].sum())
            bucket = shuffled[offset : offset + count]
            bucket = bucket[np.argsort(self._lengths[bucket], kind="stable")]
            offset += count
            used = 0
            for slot in bucket_slots:
                size = sizes[slot]
                grouped[starts[slot] : starts[slot] + size] = bucket[used : used + size]
                used += size
        return grouped


class WrittenOrder(TrainingOrder):
    """The order in a file (`data.order`), without packing.

    steps: the samples of each step. Raises UserError if a run asks for more epochs or steps than the file has.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        weights: np.ndarray,
        steps: WrittenSteps,
        *,
        micro_batch_size: int,
        padded: bool = True,
    ):
        super().__init__(
            lengths,
            weights,
            micro_batch_size=micro_batch_size,
            global_batch_size=steps.longest,
            max_length=1,
            packing=False,
            length_grouping=False,
            seed=0,
            padded=padded,
        )
        self._steps = steps
        self._constant = False

    def steps_in(self, epoch: int) -> int:
        if epoch >= self._steps.epochs:
            raise self._steps.too_short(
                f"{self._steps.epochs} passes over the rows", f"trainer.epochs={self._steps.epochs}"
            )
        return self._steps.steps_in(epoch)

    def locate(self, step: int) -> tuple[int, int]:
        if step >= len(self._steps):
            raise self._steps.too_short(f"{len(self._steps):,} steps", f"trainer.max_steps={len(self._steps)}")
        return super().locate(step)

    def _make_plan(self, epoch: int) -> _Plan:
        samples, steps = self._steps.epoch(epoch)
        return _Plan(epoch, samples, np.arange(len(samples) + 1), steps)


def _micro_batches(rows: list[Row], size: int, lengths: np.ndarray, *, padded: bool) -> Iterator[MicroBatch]:
    """Yield the rows in micro-batches of at most `size` rows; unpadded rows are grouped by length, the longest first."""
    if padded:
        groups = [rows]
    else:
        rows = sorted(rows, key=lambda row: -int(lengths[row[0]]))
        groups = [list(group) for _, group in groupby(rows, key=lambda row: int(lengths[row[0]]))]
    parts = (group[start : start + size] for group in groups for start in range(0, len(group), size))
    yield from (MicroBatch(number, tuple(part), padded=padded) for number, part in enumerate(parts))


def share(work: GlobalBatch | Sequence[MicroBatch], rank: int, world: int) -> list[MicroBatch]:
    """Return the micro-batches that `rank` computes among `world` ranks: those whose position is `rank` modulo `world`.

    Every rank gets the same number. Missing ones are filled with copies of the first micro-batch that do not count, each with
    its own index.

    Example, 5 micro-batches on 3 ranks: rank 0 gets 0 and 3, rank 1 gets 1 and 4, rank 2 gets 2 and filler 5.
    """
    micro_batches = list(work.micro_batches if isinstance(work, GlobalBatch) else work)
    assert micro_batches, "no micro-batch to share"
    rounds = -(-len(micro_batches) // world)
    for index in range(len(micro_batches), rounds * world):
        micro_batches.append(replace(micro_batches[0], index=index, filler=True))
    return micro_batches[rank::world]


def padded_batches(lengths: np.ndarray, config: RunConfig, *, answers: int = 1) -> list[MicroBatch]:
    """Return the micro-batches of an evaluation that gives every sample its own row, or as many as it gets `answers`."""
    size = max(1, (config.evaluate.micro_batch_size or config.trainer.rows) // answers)
    padded, max_length = config.data.pads_rows, config.data.max_length
    return evaluation_batches(lengths, micro_batch_size=size, max_length=max_length, packing=False, padded=padded)


def evaluation_batches(
    lengths: np.ndarray, *, micro_batch_size: int, max_length: int, packing: bool, padded: bool = True
) -> list[MicroBatch]:
    """Return micro-batches that hold every sample exactly once. Without packing they are sorted by length; if they are also not
    `padded`, each has rows of a single length.

    lengths: tokens of each sample, [samples]. The longest come first so that a lack of memory shows at once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if packing:
        samples, starts = group(best_fit(lengths, max_length))
        rows = [tuple(samples[start:end].tolist()) for start, end in pairwise(starts)]
    else:
        rows = [(int(sample),) for sample in np.argsort(-lengths, kind="stable")]
    return list(_micro_batches(rows, micro_batch_size, lengths, padded=padded or packing))
