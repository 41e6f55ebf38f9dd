"""Reads the completions that an earlier launch of this run, or another run, has recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError, first_line
from dstune.data.sampler import MicroBatch
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.records import FOLDER, Scored, from_record, identity_of, place_of, read_records


def written_step(task: ReinforcementConfig, world: World, run_dir: Path | None, step: int) -> dict[str, Scored]:
    """Return the completions that an earlier launch of this run scored at this step, by `identity_of`; the same on every rank."""
    rows: list[dict[str, Any]] = []
    if world.is_main and run_dir is not None:
        rows = read_records(run_dir / FOLDER, step)
    records = [from_record(row, task.reward_names) for row in world.broadcast(rows)]
    return {identity_of(scored.completion): scored for scored in records if scored is not None}


def recorded_step(task: ReinforcementConfig, world: World, step: int) -> dict[str, Scored] | None:
    """Return the step's completions from the run that `task.replay` names, by prompt and sample; None if it is not set.

    Raises:
        UserError: that run has none for this step, or they cannot be read. Raised on all ranks alike.
    """
    if task.replay is None:
        return None
    rows: list[dict[str, Any]] = []
    unreadable = ""
    if world.is_main:
        try:
            rows = read_records(Path(task.replay), step)
        except (OSError, ValueError) as error:
            unreadable = f"its completions of step {step} cannot be read: {first_line(error)}"
    if unreadable := world.broadcast(unreadable):
        raise UserError(
            Problem("task.replay", unreadable, "the folder `rollouts` of a run, as it was written", task.replay)
        )
    records = [from_record(row, task.reward_names) for row in world.broadcast(rows)]
    recorded = {place_of(scored.completion): scored for scored in records if scored is not None}
    if not recorded:
        reason = f"it has no completions of step {step} with the rewards of this run"
        raise UserError(Problem("task.replay", reason, "the folder `rollouts` of a run of as many steps", task.replay))
    return recorded


def replayed(
    task: ReinforcementConfig,
    world: World,
    prompts: Sequence[tuple[MicroBatch, Mapping[str, torch.Tensor]]],
    recorded: Mapping[str, Scored],
) -> list[list[Scored]]:
    """Return the recorded completions of this rank's prompts. Raises UserError, on all ranks alike, if one is missing."""
    by_batch = []
    missing: list[int] = []
    for _, batch in prompts:
        places = [(prompt, sample) for prompt in batch["sample"].tolist() for sample in range(task.samples)]
        missing += [prompt for prompt, sample in places if f"{prompt}/{sample}" not in recorded]
        by_batch.append(
            [recorded[f"{prompt}/{sample}"] for prompt, sample in places if f"{prompt}/{sample}" in recorded]
        )
    absent = [prompts for prompts in world.gather(missing) if prompts]
    if absent:
        reason = f"it lacks completions of prompt {absent[0][0]}, which this step trains"
        fix = "the same data, seed, global_batch_size and samples as in the recorded run"
        raise UserError(Problem("task.replay", reason, fix, str(task.replay)))
    return by_batch
