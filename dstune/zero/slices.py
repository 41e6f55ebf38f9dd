"""Ranks that share weights: their groups, and the conversion between complete weights and slices.

DeepSpeed gets a `Slices` as its `mpu`, the interface by which Megatron describes its ranks. It then averages gradients and
partitions optimizer states over the ranks with the same slice; it sums norms and checks for overflow over the ranks that share
weights, and counts a weight without the attribute `tensor_model_parallel` once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from dstune.config.parallel_rules import ranks_problem
from dstune.core.distributed import World, own_group
from dstune.core.errors import UserError
from dstune.zero.restore import WEIGHT, Source

CUTS = "dstune_cuts"
"""Key of `Slices.cuts` in DeepSpeed's checkpoints."""


class Slices:
    """This rank's number among those that share weights (`part`), and among those with the same slices (`replica`)."""

    def __init__(self, world: World, parts: int):
        """parts: how many neighbouring ranks share weights, so that they are on one node. Every rank must call it.

        Raises UserError if the number of ranks cannot be divided by it.
        """
        if problem := ranks_problem(world.size, parts):
            raise UserError(problem)
        self.parts, self.part = parts, world.rank % parts
        self.replica, self.replicas = world.rank // parts, world.size // parts
        groups = [range(first, first + parts) for first in range(0, world.size, parts)]
        replica_groups = [range(part, world.size, parts) for part in range(parts)]
        self.group, _ = own_group(groups, world.rank)
        self._replica_group, self._replica_ranks = own_group(replica_groups, world.rank)
        self.cuts: dict[str, int] = {}

    @classmethod
    def of(cls, parts: int, world: World) -> Slices | None:
        """Build the slices for groups of `parts` ranks, and make the ranks of a group read the same rows. None if parts is 1: each
        rank has all weights."""
        if parts == 1:
            return None
        slices = cls(world, parts)
        world.read_in_groups(parts, alike=True)
        return slices

    def cut(self, name: str, parameter: nn.Parameter, dim: int) -> None:
        """Replace a complete parameter by this rank's slice of it along `dim`."""
        # A copy: a view would keep the complete parameter in memory.
        parameter.data = parameter.data.chunk(self.parts, dim)[self.part].clone(memory_format=torch.contiguous_format)
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.cuts[name] = dim

    def parts_of(self, parameter: nn.Parameter) -> int:
        """Return how many ranks share this parameter: 1 if it is complete on every rank."""
        return self.parts if hasattr(parameter, "tensor_model_parallel") else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks that share weights, bit-equal on each of them; `tensor` is unchanged."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch_dist.all_reduce(total, group=self.group)
        return total

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the gradient norm of the complete model. Parameters that are not sliced count on a group's first rank only."""
        counted = [parameter for parameter in parameters if self.part == 0 or self.parts_of(parameter) > 1]
        gradients = [parameter.grad for parameter in counted if parameter.grad is not None]
        # On the CPU if this rank has no gradient to count.
        squared_norm = torch.nn.utils.get_total_norm(gradients).square()
        return self.sum(squared_norm.to(parameters[0].device)).sqrt()

    # -- DeepSpeed's `mpu` interface ----------------------------------------------------------------------------------

    def get_model_parallel_group(self) -> Any:
        return self.group

    def get_model_parallel_rank(self) -> int:
        return self.part

    def get_model_parallel_world_size(self) -> int:
        return self.parts

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        return self._replica_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._replica_ranks

    def get_data_parallel_rank(self) -> int:
        return self.replica

    def get_data_parallel_world_size(self) -> int:
        return self.replicas


class SlicedSource:
    """Presents a source of complete parameters as a source of this rank's slices."""

    def __init__(self, source: Source, slices: Slices):
        self._source, self._slices = source, slices
        self.buffers, self.loss_scaler, self.global_steps = source.buffers, source.loss_scaler, source.global_steps

    def read(self, name: str, kind: str = WEIGHT, start: int = 0, count: int | None = None) -> Tensor:
        dim = self._slices.cuts.get(name)
        if dim is None:
            return self._source.read(name, kind, start, count)
        complete = self._source.read(name, kind).view(self._source.shapes[name])
        rank_slice = complete.chunk(self._slices.parts, dim)[self._slices.part].reshape(-1)
        return rank_slice[start:] if count is None else rank_slice[start : start + count]

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        return {name: _slice_shape(shape, self._slices, name) for name, shape in self._source.shapes.items()}

    def kinds(self, name: str) -> tuple[str, ...]:
        return self._source.kinds(name)

    def scalars(self, name: str) -> dict[str, Any]:
        return self._source.scalars(name)


def _slice_shape(shape: torch.Size, slices: Slices, name: str) -> torch.Size:
    dim = slices.cuts.get(name)
    return torch.Size(size // slices.parts if place == dim else size for place, size in enumerate(shape))
