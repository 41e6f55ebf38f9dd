"""Second copies of the weights within each node (hpZ of ZeRO++): which ranks share them, and what DeepSpeed leaves to do.

DeepSpeed fills a node's copy of a parameter when it releases the gathered parameter, and gathers from the copy, within the node,
until an update drops it. The copy of a frozen parameter stays. Copies hold the same values as the partitions, so that the result of
a run does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dstune.config.schema import ZeroConfig
from dstune.config.zero_rules import copy_ranks
from dstune.core.distributed import World


def copy_ranks_of(zero: ZeroConfig, world: World) -> tuple[int, str]:
    """Return how many ranks of a node share a copy of the weights, 1 for no copies, and the reason if `zero.hpz` asks for copies
    that these ranks cannot keep. Every rank calls it with the same `zero`."""
    if not zero.hpz:
        return 1, ""
    places = world.gather((world.local_rank, world.local_size))
    sizes = {size for _, size in places}
    if len(sizes) > 1:
        return 1, f"nodes have different numbers of ranks ({', '.join(map(str, sorted(sizes)))})"
    if any(local != rank % world.local_size for rank, (local, _) in enumerate(places)):
        return 1, "consecutive ranks are on different nodes"  # DeepSpeed takes consecutive ranks for those of a node
    shared = copy_ranks(zero, world.size, world.local_size)
    if shared > 1:
        _share_groups()
        return shared, ""
    if world.local_size == world.size:
        return 1, "all ranks are on one node"
    return 1, "each node has a single rank, which would keep a copy of all weights"


def _share_groups() -> None:
    """Let all models and engines of this process use the same groups of ranks: DeepSpeed fails when the second one makes its
    own. Does nothing the second time."""
    from deepspeed.utils import groups

    create = groups._create_zero_param_parallel_group
    if hasattr(create, "original"):
        return

    def create_once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    create_once.original = create  # type: ignore[attr-defined]
    groups._create_zero_param_parallel_group = create_once


def drop_copies(parameters: Iterable[Any]) -> None:
    """Drop the copies of parameters whose partitions have changed, so that they are gathered from the partitions."""
    for parameter in parameters:
        parameter.ds_secondary_tensor = None
