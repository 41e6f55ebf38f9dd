"""The order in which transformers' Trainer trains rows, by accelerate's seedable sampler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainerSampler:
    """What decides the order: a pure function of the seed and the epoch."""

    row_count: int
    seed: int
    micro_batch_size: int
    """Rows of one forward pass of a rank."""
    accumulation_steps: int
    ranks: int
    drops_last: bool = False
    """Whether rows that fill no micro-batch of all ranks are left out (`dataloader_drop_last`)."""
    shuffles: bool = True

    @property
    def rows_together(self) -> int:
        """Rows that all ranks compute at once."""
        return self.micro_batch_size * self.ranks

    @property
    def batches(self) -> int:
        """Micro-batches of a rank in one epoch."""
        return self.row_count // self.rows_together if self.drops_last else -(-self.row_count // self.rows_together)

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.batches // self.accumulation_steps)

    @property
    def repeated(self) -> int:
        """Rows that an epoch has twice: its first ones fill the last micro-batches of several ranks."""
        return 0 if self.ranks == 1 or self.drops_last else -self.row_count % self.rows_together

    def epoch(self, number: int) -> list[int]:
        """Return the rows of an epoch, in order."""
        rows = list(range(self.row_count))
        if self.shuffles:
            generator = torch.Generator().manual_seed(self.seed + number)
            rows = torch.randperm(self.row_count, generator=generator).tolist()
        if self.drops_last:
            return rows[: self.batches * self.rows_together]
        first = rows[: self.rows_together]
        while len(first) < self.repeated:
            first += first
        return rows + first[: self.repeated]

    def epochs(self, steps: int) -> Iterator[list[list[int]]]:
        """Yield the rows of each step of each epoch, of as many complete epochs as `steps` steps take."""
        size = self.rows_together * self.accumulation_steps
        for number in range(-(-steps // self.steps)):
            rows = self.epoch(number)
            yield [rows[start : start + size] for start in range(0, len(rows), size)]

    def epoch_after(self, step: int) -> float:
        """Return what the Trainer notes as `epoch` after `step` optimizer steps."""
        epoch, steps = divmod(step - 1, self.steps)
        return epoch + min((steps + 1) * self.accumulation_steps, self.batches) / self.batches
