"""Assembles complete matrices from partitions for an optimizer that needs them: each on one rank, during an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as torch_dist
from torch import Tensor

from dstune.core.distributed import World
from dstune.zero.restore import Partition


@runtime_checkable
class UsesMatrices(Protocol):
    """A torch optimizer whose update of a matrix needs all of it."""

    def use_matrices(self, matrices: Matrices) -> None: ...


class Matrices:
    """Assembles the complete matrices of partitions. Every rank builds one, and calls `change` for the same partitions in the same
    order."""

    def __init__(
        self, partitions: Sequence[Partition], shapes: Mapping[str, torch.Size], world: World, device: torch.device
    ):
        """shapes: of the complete parameters. device: where messages are sent from and matrices are computed."""
        self._shapes, self._world, self._device = shapes, world, device
        self._partitions = {id(partition.key): partition for partition in partitions}
        local_counts = {fragment.name: fragment.count for partition in partitions for fragment in partition.fragments}
        self._counts: list[dict[str, int]] = world.gather(local_counts)
        """For each rank, how many elements it has of each parameter, in the order of the ranks."""

    def change(self, key: Tensor, values: Tensor, of_matrix: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `of_matrix` to each complete matrix; return this rank's elements of the results, in the layout of `key`.

        values: this rank's elements of the matrices. As many matrices are processed at a time as there are ranks: the ranks send
        their pieces of each matrix to one rank, which computes and sends the pieces back.
        """
        partition, size = self._partitions[id(key)], self._world.size
        changed = torch.zeros_like(values)
        places = {fragment.name: fragment for fragment in partition.fragments}
        for first in range(0, len(partition.names), size):
            names = partition.names[first : first + size]
            sent = [self._counts[self._world.rank].get(name, 0) for name in names] + [0] * (size - len(names))
            local_name = names[self._world.rank] if self._world.rank < len(names) else None
            received = [0 if local_name is None else counts.get(local_name, 0) for counts in self._counts]
            pieces = [values[part.offset : part.offset + part.count] for name in names if (part := places.get(name))]
            outgoing = torch.cat([*pieces, values.new_empty(0)]).to(self._device)
            whole = outgoing.new_empty(sum(received))
            torch_dist.all_to_all_single(whole, outgoing, received, sent)
            if local_name is not None:
                whole = of_matrix(whole.view(self._shapes[local_name])).reshape(-1).contiguous()
            torch_dist.all_to_all_single(outgoing, whole, sent, received)
            back = list(outgoing.to(values.device).split([count for count in sent if count]))
            for name in names:
                if part := places.get(name):
                    changed[part.offset : part.offset + part.count] = back.pop(0)
        return changed
