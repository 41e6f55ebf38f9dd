"""Put whole parameters and what the optimizer keeps of them into the partitions of a running engine.

This is how a run continues on another number of ranks or at another ZeRO stage. Every rank reads the elements of its own
partitions by parameter name, so there is no converted copy of the checkpoint, and no rank holds more than its share and
one parameter. DeepSpeed's own way (universal checkpoints) writes such a copy, shares one step counter between all
sub-groups at stage 3, gives every group the first group's hyperparameters, and cannot go from stage 2 to stage 3 or back.
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
    """What was saved, by parameter name. See `checkpoint.shards.Shards`."""

    buffers: dict[str, Tensor]
    loss_scaler: Any
    """DeepSpeed's object of an fp16 run, else None."""
    global_steps: int

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of the parameters."""
        ...

    def read(self, name: str, kind: str = WEIGHT, start: int = 0, count: int | None = None) -> Tensor:
        """Read elements [start, start + count) of a flattened parameter, or of the optimizer's tensor `kind` for it."""
        ...

    def kinds(self, name: str) -> tuple[str, ...]:
        """Return the optimizer's tensors of the parameter's size, for example `exp_avg`."""
        ...

    def scalars(self, name: str) -> dict[str, Any]:
        """Return what else the optimizer keeps, for example `step`."""
        ...


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of a parameter, which stand at `offset` of a partition."""

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """fp32 elements that this rank updates."""

    key: Tensor
    """By which the optimizer keeps their state."""
    elements: Tensor
    """The same memory as a vector."""
    like: str
    """A parameter of the group: its counters are the partition's."""
    fragments: list[Fragment]
    names: list[str]
    """Of all parameters of its group or sub-group, the same ones in the same order on every rank."""


def restore(engine: Any, stage: int, source: Source, rank: int, *, states: bool = True) -> None:
    """Give `engine` (DeepSpeed's) the weights, buffers and optimizer state of `source`. Every rank must call it.

    rank: here and below, of those that partition the same parameters. states: whether the optimizer's states are taken too.

    The learning rate and the other settings of the parameter groups stay as they are: they are the configuration's.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    wrapper = engine.optimizer
    if stage == 3:
        wrapper.checkpoint_event_prologue()
    inner: torch.optim.Optimizer = wrapper if stage == 0 else wrapper.optimizer
    with torch.no_grad():
        # One after the other: on a disk, each is in memory until the next.
        for number, partition in enumerate(_partitions(wrapper, stage, names, rank, write=True)):
            _fill(partition.elements, partition.fragments, source, WEIGHT)
            if states:
                _fill_state(inner, partition, source)
            if stage == 3:
                _weights_from_partition(wrapper, number)
        if stage == 3:
            if wrapper.persistent_parameters:  # whole on every rank; gathered again by checkpoint_event_epilogue
                wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
        elif stage > 0:
            wrapper.update_lp_params()  # the parameters of other ranks too: from these ranks, not from the disk
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
    """Return what this rank's optimizer updates."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return list(_partitions(engine.optimizer, stage, names, rank))


def reset_counters(engine: Any, stage: int, names: Collection[str], rank: int) -> None:
    """Let the optimizer of `engine` (DeepSpeed's) count the steps of the groups with the parameters `names` from 0."""
    inner: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    for partition in partitions_of(engine, stage, rank):
        step = inner.state.get(partition.key, {}).get("step")
        if partition.like in names and step is not None:
            step.zero_()


def pieces(engine: Any, stage: int, rank: int, *, states: bool = False) -> Iterator[dict[str, Tensor]]:
    """Yield the trained weights that this rank updates, as views in fp32 (at stage 0 all of them, on every rank), partition by
    partition: elements [start, start + length) of a flattened parameter by `NAME@START`.

    states: what the optimizer keeps too, as `KIND:NAME@START` (`exp_avg:...`), and its counters as `KIND:NAME`. Where states
    are on a disk, a partition is in memory until the next one is asked for.
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
                    tensors[f"{kind}:{part.name}"] = value.clone()  # safetensors takes no memory twice
        yield tensors


def _partitions(
    wrapper: Any, stage: int, names: dict[int, str], rank: int, *, write: bool = False
) -> Iterator[Partition]:
    """Yield what this rank's optimizer updates, at any stage. write: what is changed of a partition on a disk goes back to it."""
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
    """Return the fragments of a rank at stages 1 and 2: the group's parameters stand at `offsets` of one vector, of which this
    rank has the `size` elements from rank * size."""
    begin, end = rank * size, (rank + 1) * size
    fragments = []
    for parameter, offset in zip(parameters, offsets, strict=True):
        first, last = max(offset, begin), min(offset + parameter.numel(), end)
        if first < last:
            fragments.append(Fragment(names[id(parameter)], first - offset, last - first, first - begin))
    return fragments


def _shares(parameters: list[nn.Parameter], names: dict[int, str], rank: int) -> list[Fragment]:
    """Return the fragments of a rank at stage 3: it has an equal share of every parameter; the last rank's is shorter and
    padded."""
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
    """Fill in the optimizer's own tensors for a partition; those of its padding stay zero."""
    state: dict[str, Any] = {}
    old_state = inner.state.get(partition.key, {})
    for kind in source.kinds(partition.like):
        # The tensor that is there: where states are on a disk, its memory is written back.
        tensor = old_state[kind].zero_() if kind in old_state else torch.zeros_like(partition.elements)
        _fill(tensor.view(-1), partition.fragments, source, kind)
        state[kind] = tensor.view(partition.key.shape) if tensor.shape != partition.key.shape else tensor
    for name, value in source.scalars(partition.like).items():
        # A counter of its own: the optimizer counts in place.
        state[name] = value.clone().to(partition.key.device) if isinstance(value, Tensor) else value
    inner.state[partition.key] = state


def _weights_from_partition(wrapper: Any, number: int) -> None:
    """Set the parameters' own partitions at stage 3, in the model's dtype, after the fp32 ones of a sub-group."""
    flat, weights = wrapper.fp32_partitioned_groups_flat[number], wrapper.fp16_partitioned_groups_flat[number]
    if flat.numel():
        weights.copy_(flat)
    views = wrapper.unflatten(weights, wrapper.fp16_partitioned_groups[number])
    for partitioned, view in zip(wrapper.fp16_partitioned_groups[number], views, strict=True):
        partitioned.data = view.data
