"""Losses that depend on the complete step: runs a first pass over its micro-batches on all ranks before the loss of any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dstune.core.distributed import World
from dstune.models.heads import Batch, GlobalBatchHead, Head
from dstune.zero.engine import Engine


def joined(
    head: Head, engine: Engine, batches: Iterable[Batch], world: World, seeds: Sequence[int] | None = None
) -> list[dict[str, torch.Tensor]] | None:
    """Return the extra inputs from the complete step for each of this rank's micro-batches; None for a head that needs none.

    batches: on the engine's device. seeds: of each one's dropout, the same as in the pass with a graph. Micro-batch i of the step
    is number i // world size of rank i % world size, so the result does not depend on the number of ranks.
    """
    if not isinstance(head, GlobalBatchHead):
        return None
    local_parts = []
    for position, batch in enumerate(batches):
        if seeds is not None:
            torch.manual_seed(seeds[position])
        local_parts.append({name: value.cpu() for name, value in engine.evaluate(head.first_pass, batch).items()})
    parts_by_rank = world.gather(local_parts)
    ordered = [
        parts_by_rank[number % world.size][number // world.size] for number in range(world.size * len(local_parts))
    ]
    parts = [{name: value.to(engine.device) for name, value in part.items()} for part in ordered]
    shares = head.join(parts)[world.rank :: world.size]
    return [{name: value.to(engine.device) for name, value in share.items()} for share in shares]
