"""Collectives checked by value: each rank sends numbers from a formula and knows what must arrive.

All sums are of small whole numbers, which every type holds exactly, so that the order of the additions does not matter and the
result must be equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import distributed

from dstune_verify.cases import CannotRun, CheckCase
from dstune_verify.world import World

SIZES = (1, 17, 1023, 65_537, 1_048_583)
"""Elements, odd on purpose: algorithms change with the size, and the last block of each is incomplete."""
LARGEST_VALUE = 8
"""Sums over up to 16 ranks stay at 128 or below, which bf16 (8 bits) holds exactly; on more ranks values are smaller."""

Figures = tuple[str, dict[str, float], dict[str, float]]


def values(rank: int, count: int, ranks: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the numbers that `rank` sends. [count]"""
    largest = max(1, min(LARGEST_VALUE, 128 // ranks))
    numbers = (torch.arange(count, dtype=torch.int64, device=device) * (2 * rank + 3) + 5 * rank) % (largest + 1)
    return numbers.to(dtype)


def all_reduce(world: World, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    received = values(world.rank, count, world.size, dtype, world.device)
    distributed.all_reduce(received)
    return received, _sum(world, count, dtype)


def all_reduce_max(world: World, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    received = values(world.rank, count, world.size, dtype, world.device)
    distributed.all_reduce(received, op=distributed.ReduceOp.MAX)
    sent = [values(rank, count, world.size, dtype, world.device) for rank in range(world.size)]
    return received, torch.stack(sent).amax(0)


def reduce_scatter(world: World, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    sent = values(world.rank, count * world.size, world.size, dtype, world.device)
    received = torch.empty(count, dtype=dtype, device=world.device)
    distributed.reduce_scatter_tensor(received, sent)
    return received, _sum(world, count * world.size, dtype)[world.rank * count : (world.rank + 1) * count]


def all_gather(world: World, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    received = torch.empty(count * world.size, dtype=dtype, device=world.device)
    distributed.all_gather_into_tensor(received, values(world.rank, count, world.size, dtype, world.device))
    sent = [values(rank, count, world.size, dtype, world.device) for rank in range(world.size)]
    return received, torch.cat(sent)


def broadcast(world: World, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    source = world.size - 1
    received = values(world.rank, count, world.size, dtype, world.device)
    distributed.broadcast(received, source)
    return received, values(source, count, world.size, dtype, world.device)


def all_to_all(world: World, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    sent = values(world.rank, count * world.size, world.size, dtype, world.device)
    received = torch.empty_like(sent)
    distributed.all_to_all_single(received, sent)
    mine = slice(world.rank * count, (world.rank + 1) * count)
    of_ranks = [values(rank, count * world.size, world.size, dtype, world.device)[mine] for rank in range(world.size)]
    return received, torch.cat(of_ranks)


def _sum(world: World, count: int, dtype: torch.dtype) -> torch.Tensor:
    total = sum(values(rank, count, world.size, torch.float32, world.device) for rank in range(world.size))
    assert isinstance(total, torch.Tensor)
    return total.to(dtype)


COLLECTIVES: dict[str, Callable[[World, int, torch.dtype], tuple[torch.Tensor, torch.Tensor]]] = {
    "all_reduce": all_reduce,
    "all_reduce max": all_reduce_max,
    "reduce_scatter": reduce_scatter,
    "all_gather": all_gather,
    "broadcast": broadcast,
    "all_to_all": all_to_all,
}


def check(names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], world: World) -> Figures:
    """Call collectives and compare what arrives with what must arrive, on every rank."""
    wrong, tried, unsupported = [], 0, []
    for name in names:
        for dtype in dtypes:
            for count in sizes:
                try:
                    received, expected = COLLECTIVES[name](world, count, dtype)
                except (RuntimeError, NotImplementedError) as error:
                    if not _is_unsupported(error):
                        raise
                    unsupported.append(name)
                    break
                tried += 1
                wrong += list(
                    differences(f"{name} of {count:,} {str(dtype).removeprefix('torch.')}", received, expected)
                )
    if not tried:
        raise CannotRun(f"the backend has no {' or '.join(dict.fromkeys(unsupported))}")
    return "; ".join(wrong[:3]), {"wrong": float(len(wrong))}, {"wrong": 0.0}


def differences(what: str, received: torch.Tensor, expected: torch.Tensor) -> Iterator[str]:
    """Say how much of what arrived is wrong. Yields nothing if all is right."""
    if not torch.equal(received, expected):
        place = int((received != expected).nonzero()[0])
        count = int((received != expected).sum())
        yield (
            f"{what}: {count:,} wrong value{'s' * (count > 1)}, the first at {place:,}: "
            f"{float(received[place]):g}, expected {float(expected[place]):g}"
        )


def _is_unsupported(error: Exception) -> bool:
    """Return whether the backend says that it has no such collective or type. All ranks get the same answer."""
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(
        words in text for words in ("not support", "unsupported", "not implemented", "invalid scalar type")
    )


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int32, torch.int64)


def _case(
    name: str, names: tuple[str, ...], dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], *, short: bool
) -> CheckCase:
    return CheckCase(name, "torch", lambda world: check(names, dtypes, sizes, world), short=short)


CASES = (
    _case("collectives-short", ("all_reduce", "reduce_scatter", "all_gather", "broadcast"), FLOATS[:2], SIZES[1:4], short=True),
    *(_case(f"collective-{name.replace(' ', '-')}", (name,), FLOATS + WHOLE, SIZES, short=False) for name in COLLECTIVES),
)  # fmt: skip
