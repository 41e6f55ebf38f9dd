"""Exchanges control messages between ranks: small numbers and decisions, never tensors of the model.

They have their own gloo group, on the CPU and in float64. So agreeing on a decision does not wait for the GPU's stream, and sums
of token counts are exact (float64 counts exactly up to 2**53).
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as torch_dist

from dstune.core import messages
from dstune.core.errors import TrainingFailed
from dstune.core.rank_env import GROUP_SECRET, RankEnv

T = TypeVar("T")

CONTROL_TIMEOUT = timedelta(hours=12)
"""Long enough for rank 0 to write a checkpoint or an export while the others wait. Dead ranks are found by the process that
started them, not by this time-out."""


class World:
    """The ranks of this run. `torch.distributed` must be initialised."""

    def __init__(self, env: RankEnv):
        self.env = env
        self.rank = env.rank
        self.size = env.world_size
        self.local_rank = env.local_rank
        self.local_size = env.local_size
        self.data_parallel_rank, self.data_parallel_size = env.rank, env.world_size
        """Number of this rank's group, and how many groups there are. Each group reads different rows; it has one rank unless
        ranks share rows."""
        self.place_in_group = 0
        self.counts = True
        """Whether this rank's sums over rows count. If several ranks compute the same rows, only those of the first one do."""
        prove(None, range(self.size), self.rank, "all")
        self._control: Any = torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        prove(self._control, range(self.size), self.rank, "control")

    def read_in_groups(self, ranks: int, *, alike: bool = False) -> None:
        """Form groups of `ranks` neighbouring ranks that read the same rows.

        alike: the ranks of a group compute the same values for every row, with the same random numbers.
        """
        self.data_parallel_rank, self.data_parallel_size = self.rank // ranks, self.size // ranks
        place = self.rank % ranks
        self.place_in_group, self.counts = (0, place == 0) if alike else (place, True)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather_numbers(self, numbers: Sequence[float]) -> np.ndarray:
        """Gather `numbers` of every rank: float64 [world size, len(numbers)]. Every rank must call it, with equal lengths."""
        local = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(local) for _ in range(self.size)]
        torch_dist.all_gather(everyone, local, group=self._control)
        return torch.stack(everyone).numpy()

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sum over all ranks, in rank order on every rank, so that all ranks get the same bits."""
        return [float(total) for total in self.gather_numbers(numbers).sum(axis=0)]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank; the answer is the same on all ranks."""
        return bool(self.gather_numbers([float(flag)]).any())

    def gather(self, value: T) -> list[T]:
        """Gather one value from each rank; return them in rank order on every rank. The type must be one for `messages.encode`."""
        return messages.gather(value, self._control)

    def gather_groups(self, value: T) -> list[T]:
        """Gather one value from each group of ranks that reads the same rows, that of its first rank, in the order of groups. Every
        rank must call it."""
        by_group: dict[int, T] = {}
        for group, theirs in self.gather((self.data_parallel_rank, value)):
            by_group.setdefault(group, theirs)
        return [by_group[group] for group in sorted(by_group)]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank. The type must be one for `messages.encode`."""
        return cast(T, messages.broadcast(value, self._control))

    def barrier(self) -> None:
        torch_dist.barrier(group=self._control)


def prove(group: Any, ranks: Sequence[int], rank: int, name: str) -> None:
    """Let all ranks of a new group prove to each other that they belong to the same launch, before anything else is sent.

    Libraries send objects as pickles, which run code when they are loaded: a stranger who takes a rank's place on the network could
    run code in the others. Each rank sends a random number, then HMAC-SHA256(secret, name | all numbers | rank). Does nothing
    under a launcher that provides no secret (other than dstune's). Does not stop a stranger who relays everything between two
    real ranks.

    Raises:
        TrainingFailed: a rank does not know the secret.
    """
    secret = os.environ.get(GROUP_SECRET)
    if not secret or len(ranks) < 2:
        return
    device = messages.device_of(group)

    def exchange(local_proof: bytes) -> list[bytes]:
        tensor = torch.tensor(list(local_proof), dtype=torch.uint8, device=device)
        everyone = [torch.empty_like(tensor) for _ in ranks]
        torch_dist.all_gather(everyone, tensor, group=group)
        return [bytes(row.cpu().tolist()) for row in everyone]

    numbers = b"".join(exchange(secrets.token_bytes(32)))

    def proof(prover: int) -> bytes:
        return hmac.digest(secret.encode(), b"|".join([name.encode(), numbers, str(prover).encode()]), "sha256")

    for other, received_proof in zip(ranks, exchange(proof(rank)), strict=True):
        if not hmac.compare_digest(received_proof, proof(other)):
            raise TrainingFailed(f"the process that answers as rank {other} does not belong to this launch")


def own_group(groups: Sequence[Sequence[int]], rank: int) -> tuple[Any, list[int]]:
    """Make all process groups; return the group that contains `rank`, and its ranks. Every rank must make every group, in the same
    order."""
    group_of_rank = None
    for ranks in groups:
        group = torch_dist.new_group(list(ranks))
        if rank in ranks:
            prove(group, ranks, rank, "rows")
            group_of_rank = group, list(ranks)
    assert group_of_rank is not None
    return group_of_rank
