"""Replaces prompts whose completions all have the same reward with other prompts of the training data: dynamic sampling (Yu et al.
2025, DAPO, arXiv:2503.14476, section 3.2).

The order in which prompts of a step are tried is a function of the run's seed and the step, and the place of a prompt in its step
decides which one replaces it. So nothing is saved, and the number of ranks does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dstune.core.distributed import World
from dstune.data.sampler import MicroBatch
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.metrics import lacks_signal
from dstune.tasks.reinforcement.records import Scored

Prompts = tuple[MicroBatch, Mapping[str, Any]]
"""A micro-batch of prompts, and its arrays (`encode.prompt_batch`)."""
STREAM = 0x5EED
"""Keeps the order of replacements apart from other random numbers of the run."""


@dataclass
class Replaced:
    """A group of completions that was replaced."""

    round: int
    place: int
    """Its place among all prompts of the step, from 0."""
    group: list[Scored]


class Candidates:
    """The prompts that may replace others in a step, in their order."""

    def __init__(self, keys: tuple[int, int], prompts: int, taken: Collection[int]):
        """keys: the run's seed, and the step. prompts: how many there are. taken: those that the step has."""
        order = np.random.default_rng([STREAM, *keys]).permutation(prompts).tolist()
        self._remaining = iter([number for number in order if number not in taken])

    def take(self, count: int) -> list[int]:
        """Return the next `count` prompts, or fewer if there are no more."""
        return [number for _, number in zip(range(count), self._remaining, strict=False)]


def redraw(
    task: ReinforcementConfig,
    world: World,
    parts: Sequence[MicroBatch],
    completed: list[list[Scored]],
    candidates: Callable[[Collection[int]], Candidates],
    complete: Callable[[Sequence[MicroBatch]], list[list[Scored]]],
) -> list[Replaced]:
    """Replace groups without signal in `completed`, at most `task.redraws` times; return what was replaced on this rank.

    parts: this rank's micro-batches of prompts; completed: their completions. candidates: makes the candidates from the prompts of
    the step on all ranks. complete: samples and scores the completions of micro-batches of prompts. Every rank must call it.
    """
    samples, replaced = task.samples, list[Replaced]()
    numbers = [[] if part.filler else part.samples for part in parts]
    by_rank = world.gather_groups(numbers)
    places = [
        (position, rank, row)
        for position in range(len(parts))
        for rank, theirs in enumerate(by_rank)
        for row in range(len(theirs[position]))
    ]
    queue: Candidates | None = None
    for number in range(1, task.redraws + 1):
        groups = [[batch[start : start + samples] for start in range(0, len(batch), samples)] for batch in completed]
        empty = [
            [not part.filler and lacks_signal(task, group) for group in of_part]
            for part, of_part in zip(parts, groups, strict=True)
        ]
        # Ranks that share rows follow the first of them: a reward that asks a judge may differ between them.
        flags = world.gather_groups(empty)
        slots = [place for place, (position, rank, row) in enumerate(places) if flags[rank][position][row]]
        if not slots:
            break
        queue = queue or candidates({prompt for theirs in by_rank for part in theirs for prompt in part})
        drawn = dict(zip(slots, queue.take(len(slots)), strict=False))
        if not drawn:
            break
        asked = sorted({places[place][0] for place in drawn})
        local: dict[int, dict[int, tuple[int, int]]] = {position: {} for position in asked}
        for place, prompt in drawn.items():
            position, rank, row = places[place]
            if rank == world.data_parallel_rank:
                local[position][row] = place, prompt
        batches = [_part(parts[position], [prompt for _, prompt in local[position].values()]) for position in asked]
        for position, new in zip(asked, complete(batches), strict=True):
            for index, (row, (place, _)) in enumerate(local[position].items()):
                rows = slice(row * samples, (row + 1) * samples)
                replaced.append(Replaced(number, place, completed[position][rows]))
                completed[position][rows] = new[index * samples : (index + 1) * samples]
    for item in replaced:
        for scored in item.group:
            scored.replaced = True
    return replaced


def _part(part: MicroBatch, prompts: Sequence[int]) -> MicroBatch:
    """Return `part` with other prompts; if there are none, a filler, since all ranks generate together."""
    rows = tuple((prompt,) for prompt in prompts or part.samples[:1])
    return replace(part, rows=rows, filler=not prompts)
