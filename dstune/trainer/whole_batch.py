"""Losses that need the whole step: a pass over all of its micro-batches on all ranks before the loss of any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dstune.core.distributed import World
from dstune.models.heads import Batch, GlobalBatchHead, Head
from dstune.zero.engine import Engine


def joined(
    head: Head, engine: Engine, batches: Iterable[Batch], world: World, seeds: Sequence[int] | None = None
) -> list[dict[str, torch.Tensor]] | None:
    """Return what each of this rank's micro-batches needs of the whole step; None for a head that needs nothing of it.

    batches: on the engine's device. seeds: of the dropout of each, the same as in the pass with a graph. Micro-batch i of
    the step is the one at i // world size of rank i % world size, so the result does not depend on the number of ranks.
    """
    if not isinstance(head, GlobalBatchHead):
        return None
    local_parts = []
    for position, batch in enumerate(batches):
        if seeds is not None:
            torch.manual_seed(seeds[position])
        local_parts.append({name: value.cpu() for name, value in engine.evaluate(head.first_pass, batch).items()})
    everyone = world.gather(local_parts)
    ordered = [everyone[number % world.size][number // world.size] for number in range(world.size * len(local_parts))]
    parts = [{name: value.to(engine.device) for name, value in part.items()} for part in ordered]
    shares = head.join(parts)[world.rank :: world.size]
    return [{name: value.to(engine.device) for name, value in share.items()} for share in shares]
