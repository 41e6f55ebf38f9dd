"""The seam for tasks whose rows are prompts: what trains of a step is known only when the model has answered them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from dstune.trainer.prefetcher import RankBatch


class RolloutsUnavailable(Exception):
    """What writes the completions does not answer, and may later: the run saves what it has and leaves, to be continued."""


class RolloutRun(Protocol):
    """What a rollout needs of `loop.Training`."""

    total_steps: int

    def around(self, phase: str) -> AbstractContextManager[None]: ...


class RolloutStep(Protocol):
    """What a rollout needs of `loop.Step`."""

    number: int
    batch: RankBatch

    @property
    def epoch(self) -> float: ...


class Rollouts(Protocol):
    """Turns the prompts of each step into what trains. Every rank calls its methods alike."""

    @property
    def updates(self) -> int:
        """Optimizer updates with what one rollout gave."""

    def begin_step(self, run: RolloutRun, step: RolloutStep) -> RankBatch:
        """Return the micro-batches that train in place of the prompts in `step.batch`. Raises RolloutsUnavailable, on all ranks
        alike."""

    def several_updates(self) -> AbstractContextManager[Callable[[int], Sequence[Mapping[str, torch.Tensor]]]]:
        """Wrap the updates of a step; yields the function that says, for the number of each, which tensors its micro-batches get
        beside their own."""

    def end_step(self, step: RolloutStep, sums: Mapping[str, float]) -> dict[str, float]:
        """Return sums to report beside `sums`, this rank's of the head. Raises UserError, on all ranks alike."""

    def close(self) -> None: ...
