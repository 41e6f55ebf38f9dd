"""Restores complete parameters and their optimizer states into the partitions of a running engine.

This is how a run continues on another number of ranks or at another ZeRO stage. Every rank reads the elements of its own
partitions by parameter name. So there is no converted copy of the checkpoint, and no rank holds more than its share and one
parameter. DeepSpeed's universal checkpoints need such a copy, share one step counter between all sub-groups at stage 3,
give every group the first group's hyperparameters, and cannot go from stage 2 to stage 3 or back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dstune.zero.swap import swapped_in

WEIGHT = "weight"


class Source(Protocol):
    """A checkpoint, read by parameter name. See `checkpoint.shards.Shards`."""

    buffers: dict[str, Tensor]
    loss_scaler: Any
    """DeepSpeed's loss scaler of an fp16 run, else None."""
    global_steps: int

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shapes of the complete parameters."""
        ...

    def read(self, name: str, kind: str = WEIGHT, start: int = 0, count: int | None = None) -> Tensor:
        """Read elements [start, start + count) of a flattened parameter, or of the optimizer's tensor `kind` for it."""
        ...

    def kinds(self, name: str) -> tuple[str, ...]:
        """Return the names of the optimizer's tensors of the parameter's size, for example `exp_avg`."""
        ...

    def scalars(self, name: str) -> dict[str, Any]:
        """Return the optimizer's other states of the parameter, for example `step`."""
        ...


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of a parameter, at `offset` of a partition."""

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """fp32 elements that this rank updates."""

    key: Tensor
    """The tensor under which the optimizer keeps their state."""
    elements: Tensor
    """The memory of `key` as a vector."""
    like: str
    """Name of a parameter of the group; its counters (`step`) are also the partition's."""
    fragments: list[Fragment]
    names: list[str]
    """Names of all parameters of its group or sub-group, in the same order on every rank."""


def restore(engine: Any, stage: int, source: Source, rank: int, *, states: bool = True) -> None:
    """Load weights, buffers and optimizer states from `source` into `engine` (DeepSpeed's). Every rank must call it.

    rank: here and below, this rank's number among those that partition the same parameters. states: whether to load the
    optimizer's states too. The learning rate and other settings of the parameter groups stay as configured.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    wrapper = engine.optimizer
    if stage == 3:
        wrapper.checkpoint_event_prologue()
    inner: torch.optim.Optimizer = wrapper if stage == 0 else wrapper.optimizer
    with torch.no_grad():
        # Strictly one after the other: if states are on a disk, a partition is in memory only until the next one is requested.
        for number, partition in enumerate(_partitions(wrapper, stage, names, rank, write=True)):
            _fill(partition.elements, partition.fragments, source, WEIGHT)
            if states:
                _fill_state(inner, partition, source)
            if stage == 3:
                _weights_from_partition(wrapper, number)
        if stage == 3:
            if wrapper.persistent_parameters:  # complete on every rank; checkpoint_event_epilogue gathers them again
                wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
        elif stage > 0:
            wrapper.update_lp_params()  # other ranks' parameters come from these ranks, not from the disk
        for name, buffer in engine.module.named_buffers():
            if name in source.buffers:
                buffer.copy_(source.buffers[name])
    if stage == 3:
        wrapper.checkpoint_event_epilogue()
    if source.loss_scaler is not None and hasattr(wrapper, "loss_scaler"):
        source.loss_scaler.raise_error_at_min_scale = False
        wrapper.loss_scaler = source.loss_scaler
    engine.global_steps = source.global_steps


def partitions_of(engine: Any, stage: int, rank: int) -> list[Partition]:
    """Return the partitions that this rank's optimizer updates."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return list(_partitions(engine.optimizer, stage, names, rank))


def reset_counters(engine: Any, stage: int, names: Collection[str], rank: int) -> None:
    """Reset the optimizer's step counters of the groups that hold the parameters `names`. engine: DeepSpeed's."""
    inner: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    for partition in partitions_of(engine, stage, rank):
        step = inner.state.get(partition.key, {}).get("step")
        if partition.like in names and step is not None:
            step.zero_()


def pieces(engine: Any, stage: int, rank: int, *, states: bool = False) -> Iterator[dict[str, Tensor]]:
    """Yield the trained weights that this rank updates, partition by partition, as fp32 views (at stage 0 all weights, on every
    rank). `NAME@START` maps to elements [start, start + length) of a flattened parameter.

    states: also yield the optimizer's states, as `KIND:NAME@START` (`exp_avg:...`), and its counters, as `KIND:NAME`. If states
    are on a disk, a partition stays in memory only until the next one is requested.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    inner: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    for partition in _partitions(engine.optimizer, stage, names, rank):
        tensors = {}
        state = inner.state.get(partition.key, {}) if states else {}
        for part in partition.fragments:
            span = slice(part.offset, part.offset + part.count)
            tensors[f"{part.name}@{part.start}"] = partition.elements[span]
            for kind, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if value.dim():
                    tensors[f"{kind}:{part.name}@{part.start}"] = value.view(-1)[span]
                else:
                    tensors[f"{kind}:{part.name}"] = value.clone()  # safetensors refuses tensors that share memory
        yield tensors


def _partitions(
    wrapper: Any, stage: int, names: dict[int, str], rank: int, *, write: bool = False
) -> Iterator[Partition]:
    """Yield the partitions that this rank's optimizer updates, at any stage. write: if a partition is on a disk, write its changes
    back."""
    if stage == 0:
        for group in wrapper.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                yield Partition(
                    parameter, parameter.data.view(-1), name, [Fragment(name, 0, parameter.numel(), 0)], [name]
                )
    elif stage == 3:
        for number, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
            parameters = wrapper.fp16_groups[number]
            with swapped_in(wrapper, number, write=write):
                yield _partition(flat, parameters, names, _shares(parameters, names, rank))
    elif hasattr(wrapper, "bf16_groups"):  # stage 1 with fp32 gradients is DeepSpeed's BF16_Optimizer
        for parameters, flat in zip(wrapper.bf16_groups, wrapper.fp32_groups_flat_partition, strict=True):
            fragments = _overlaps(parameters, _end_to_end(parameters), names, rank, flat.numel())
            yield _partition(flat, parameters, names, fragments)
    else:
        groups = zip(
            wrapper.round_robin_bit16_groups,
            wrapper.round_robin_bit16_offsets,
            wrapper.single_partition_of_fp32_groups,
            strict=True,
        )
        for parameters, offsets, flat in groups:
            fragments = _overlaps(parameters, offsets, names, rank, flat.numel())
            yield _partition(flat, parameters, names, fragments)


def _partition(
    flat: Tensor, parameters: list[nn.Parameter], names: dict[int, str], fragments: list[Fragment]
) -> Partition:
    members = [names[id(parameter)] for parameter in parameters]
    return Partition(flat, flat.data, members[0], fragments, members)


def _end_to_end(parameters: list[nn.Parameter]) -> list[int]:
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        end += parameter.numel()
    return offsets


def _overlaps(
    parameters: list[nn.Parameter], offsets: list[int], names: dict[int, str], rank: int, size: int
) -> list[Fragment]:
    """Return a rank's fragments at stages 1 and 2: the group's parameters are at `offsets` of one vector, and the rank has `size`
    elements of it, starting at rank * size."""
    begin, end = rank * size, (rank + 1) * size
    fragments = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        first, last = max(offset, begin), min(offset + parameter.numel(), end)
        if first < last:
            fragments.append(Fragment(names[id(parameter)], first - offset, last - first, first - begin))
    return fragments


def _shares(parameters: list[nn.Parameter], names: dict[int, str], rank: int) -> list[Fragment]:
    """Return a rank's fragments at stage 3: an equal share of every parameter. The last shares may have fewer elements, or none,
    and are padded."""
    fragments, offset = [], 0
    for parameter in parameters:
        share = parameter.partition_numel()  # type: ignore[attr-defined]
        start = rank * share
        count = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if count > 0:
            fragments.append(Fragment(names[id(parameter)], start, count, offset))
        offset += share
    return fragments


def _fill(target: Tensor, fragments: list[Fragment], source: Source, kind: str) -> None:
    for part in fragments:
        target[part.offset : part.offset + part.count] = source.read(part.name, kind, part.start, part.count)


def _fill_state(inner: torch.optim.Optimizer, partition: Partition, source: Source) -> None:
    """Load the optimizer's states of a partition; its padding stays zero."""
    state: dict[str, Any] = {}
    old_state = inner.state.get(partition.key, {})
    for kind in source.kinds(partition.like):
        # Reuse the existing tensor: if states are on a disk, its memory is what is written back.
        tensor = old_state[kind].zero_() if kind in old_state else torch.zeros_like(partition.elements)
        _fill(tensor.view(-1), partition.fragments, source, kind)
        state[kind] = tensor.view(partition.key.shape) if tensor.shape != partition.key.shape else tensor
    for name, value in source.scalars(partition.like).items():
        # A copy for each partition, since the optimizer increments the counter in place.
        state[name] = value.clone().to(partition.key.device) if isinstance(value, Tensor) else value
    inner.state[partition.key] = state


def _weights_from_partition(wrapper: Any, number: int) -> None:
    """Copy a sub-group's fp32 partition into the parameters' partitions at stage 3, in the model's dtype."""
    flat, weights = wrapper.fp32_partitioned_groups_flat[number], wrapper.fp16_partitioned_groups_flat[number]
    if flat.numel():
        weights.copy_(flat)
    views = wrapper.unflatten(weights, wrapper.fp16_partitioned_groups[number])
    for partitioned, view in zip(wrapper.fp16_partitioned_groups[number], views, strict=True):
        partitioned.data = view.data
