"""Ranks that share weights: who they are, and how a whole weight becomes slices and slices a whole weight.

DeepSpeed is handed a `Slices` as its `mpu`, the object that Megatron tells it of its ranks with: it then averages gradients and
partitions what the optimizer keeps over the ranks that have the same slice, and sums norms and looks for overflow over those
that share weights, where every weight without the mark `tensor_model_parallel` is counted once.
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
"""Key of `Slices.cuts` in what DeepSpeed saves."""


class Slices:
    """This rank's place among those that share weights, and among those that have the same slices."""

    def __init__(self, world: World, parts: int):
        """parts: ranks that share weights; neighbours, so that they are on one node. Every rank must call it.

        Raises UserError where the ranks cannot be divided so.
        """
        if problem := ranks_problem(world.size, parts):
            raise UserError(problem)
        self.parts, self.part = parts, world.rank % parts
        self.replica, self.replicas = world.rank // parts, world.size // parts
        groups = [range(first, first + parts) for first in range(0, world.size, parts)]
        alike = [range(part, world.size, parts) for part in range(parts)]
        self.group, _ = own_group(groups, world.rank)
        self._alike, self._ranks_alike = own_group(alike, world.rank)
        self.cuts: dict[str, int] = {}

    @classmethod
    def of(cls, parts: int, world: World) -> Slices | None:
        """Make slices for groups of `parts` ranks, None where each has all weights; from then on the groups read the rows of
        `world`."""
        if parts == 1:
            return None
        slices = cls(world, parts)
        world.read_in_groups(parts, alike=True)
        return slices

    def cut(self, name: str, parameter: nn.Parameter, dim: int) -> None:
        """Leave this rank its slice of a whole parameter along `dim`."""
        # A copy: a view would keep the whole one in memory.
        parameter.data = parameter.data.chunk(self.parts, dim)[self.part].clone(memory_format=torch.contiguous_format)
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.cuts[name] = dim

    def parts_of(self, parameter: nn.Parameter) -> int:
        """Count the ranks that share this parameter: 1 for one that is whole on every rank."""
        return self.parts if hasattr(parameter, "tensor_model_parallel") else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share weights, the same bits on each of them; `tensor` stays as it is."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        torch_dist.all_reduce(total, group=self.group)
        return total

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of whole weights, from those of their slices; whole ones are counted on the first
        rank."""
        counted = [parameter for parameter in parameters if self.part == 0 or self.parts_of(parameter) > 1]
        gradients = [parameter.grad for parameter in counted if parameter.grad is not None]
        squared_norm = torch.nn.utils.get_total_norm(
            gradients
        ).square()  # on the CPU where this rank has no gradient to count
        return self.sum(squared_norm.to(parameters[0].device)).sqrt()

    # -- what DeepSpeed asks ------------------------------------------------------------------------------------------

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
        return self._alike

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._ranks_alike

    def get_data_parallel_rank(self) -> int:
        return self.replica

    def get_data_parallel_world_size(self) -> int:
        return self.replicas


class SlicedSource:
    """A source of whole parameters, seen as one of slices."""

    def __init__(self, source: Source, slices: Slices):
        self._source, self._slices = source, slices
        self.buffers, self.loss_scaler, self.global_steps = source.buffers, source.loss_scaler, source.global_steps

    def read(self, name: str, kind: str = WEIGHT, start: int = 0, count: int | None = None) -> Tensor:
        dim = self._slices.cuts.get(name)
        if dim is None:
            return self._source.read(name, kind, start, count)
        whole = self._source.read(name, kind).view(self._source.shapes[name])
        rank_slice = whole.chunk(self._slices.parts, dim)[self._slices.part].reshape(-1)
        return rank_slice[start:] if count is None else rank_slice[start : start + count]

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        return {name: _part_of(shape, self._slices, name) for name, shape in self._source.shapes.items()}

    def kinds(self, name: str) -> tuple[str, ...]:
        return self._source.kinds(name)

    def scalars(self, name: str) -> dict[str, Any]:
        return self._source.scalars(name)


def _part_of(shape: torch.Size, slices: Slices, name: str) -> torch.Size:
    dim = slices.cuts.get(name)
    return torch.Size(size // slices.parts if place == dim else size for place, size in enumerate(shape))
