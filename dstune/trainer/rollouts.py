"""Interfaces for tasks whose rows are prompts: the targets of a step exist only after the model has answered them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from dstune.trainer.prefetcher import RankBatch


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
