"""For tasks whose rows are prompts: the targets of a step exist only after the model has answered them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeVar

from dstune.core.distributed import World
from dstune.data.sampler import MicroBatch

if TYPE_CHECKING:
    import torch

    from dstune.trainer.prefetcher import RankBatch

Answer = TypeVar("Answer")


class RolloutsUnavailable(Exception):
    """The sampler does not answer now, but may later: the run is saved and ends, to be continued."""


class RolloutsFailed(Exception):
    """The answers of a step cannot be scored: the run saves its last step and ends as failed."""


class RolloutRun(Protocol):
    """The part of `loop.Training` that a rollout needs."""

    total_steps: int

    def around(self, phase: str) -> AbstractContextManager[None]: ...


class RolloutStep(Protocol):
    """The part of `loop.Step` that a rollout needs."""

    number: int
    number_in_launch: int
    batch: RankBatch

    @property
    def epoch(self) -> float: ...


class Rollouts(Protocol):
    """Turns the prompts of each step into micro-batches to train on. Every rank must call its methods in the same order."""

    @property
    def updates(self) -> int:
        """Number of optimizer updates with the completions of one rollout."""

    def begin_step(self, run: RolloutRun, step: RolloutStep) -> RankBatch:
        """Return the micro-batches that train in place of the prompts in `step.batch`. Raises RolloutsUnavailable
        or RolloutsFailed, on all ranks alike."""

    def several_updates(self) -> AbstractContextManager[Callable[[int], Sequence[Mapping[str, torch.Tensor]]]]:
        """Wrap the updates of a step. Yields a function from the number of an update to the tensors that are added to each of its
        micro-batches."""

    def end_step(self, step: RolloutStep, sums: Mapping[str, float]) -> dict[str, float]:
        """Return sums to report beside `sums`, this rank's of the head. Raises UserError, on all ranks alike."""

    def close(self) -> None: ...


def batches_of_answers(
    answers: Sequence[tuple[MicroBatch, Sequence[Answer]]],
    size: int,
    world: World,
    tensors: Callable[[Sequence[tuple[Answer, bool]]], dict[str, torch.Tensor]],
) -> tuple[tuple[MicroBatch, dict[str, torch.Tensor]], ...]:
    """Return micro-batches of `size` answers; every rank has the same number of them. Every rank must call it.

    answers: of this rank, by micro-batch of prompts; at least one, since a rank without enough repeats its first one. tensors:
    builds a micro-batch from answers, each with whether it counts; those to fillers do not.
    """
    rows = [(answer, not part.filler) for part, of_part in answers for answer in of_part]
    rows.sort(key=lambda row: not row[1])  # fillers last; stable
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    most = int(world.gather_numbers([len(chunks)]).max())
    chunks += [[(rows[0][0], False)]] * (most - len(chunks))
    batches = []
    for number, chunk in enumerate(chunks):
        filler = not any(counts for _, counts in chunk)
        part = MicroBatch(number * world.size + world.rank, tuple((0,) for _ in chunk), filler)
        batches.append((part, tensors(chunk)))
    return tuple(batches)
