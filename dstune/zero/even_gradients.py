"""Makes all ranks of ZeRO-1 and 2 reduce the same gradients in the same order, whatever parameters their rows reach.

DeepSpeed fills its buckets in the order in which a rank's backward pass produces gradients, and leaves out parameters without one.
Where rows decide which parameters are reached (experts as modules of their own, a vision tower whose rank has no image, one head
of several), buckets of two ranks hold different parameters: their sums are wrong, or the collective fails.

The first backward pass agrees on an order. Ranks compare it chunk by chunk: as long as it is the same everywhere, gradients are
reduced when they arrive, as DeepSpeed does by itself. Every later pass follows that order, without further messages. A gradient
that arrives early waits for its turn; a missing one becomes zeros when the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import xxhash
from torch import nn

Place = tuple[nn.Parameter, int]
"""A parameter and the number of its group in the optimizer."""


class EvenGradients:
    """Replaces the methods by which DeepSpeed's optimizer wrapper of ZeRO-1 or 2 collects gradients."""

    def __init__(self, wrapper: Any):
        """wrapper: `engine.optimizer` of several ranks; its methods are replaced on this object."""
        self._wrapper = wrapper
        self._in_backward = bool(
            getattr(wrapper, "partition_gradients", False) or getattr(wrapper, "overlap_comm", False)
        )
        """Whether DeepSpeed reduces during the backward pass; otherwise after it, in the order of the groups."""
        self._has_buckets = hasattr(wrapper, "process_gradients")
        self._places: list[Place] = []
        self.restart()
        if not self._has_buckets:
            return
        self._process: Callable[[nn.Parameter, int], None] = wrapper.process_gradients
        if self._in_backward:
            self._epilogue: Callable[[], None] = wrapper.independent_gradient_partition_epilogue
            wrapper.process_gradients = self._on_gradient
            wrapper.independent_gradient_partition_epilogue = self._on_end
        else:
            self._reduce: Callable[..., None] = wrapper.reduce_gradients
            wrapper.reduce_gradients = self._on_reduce

    def restart(self) -> None:
        """Agree anew in the next backward pass, since other parameters require gradients now."""
        groups = self._wrapper.bit16_groups if self._has_buckets else self._wrapper.bf16_groups
        self._places = [(p, number) for number, group in enumerate(groups) for p in group if p.requires_grad]
        self._index_of = {id(p): index for group in groups for index, p in enumerate(group)}
        self._group_of = {id(parameter): number for parameter, number in self._places}
        self._numbers = {id(parameter): number for number, (parameter, _) in enumerate(self._places)}
        self._order: list[nn.Parameter] = []
        self._expected: set[int] = set()
        """Ids of the parameters in `_order`: each is reduced in every pass."""
        self._agreed = False
        self._begin()

    def _begin(self) -> None:
        self._turn = 0
        self._even = True
        self._held: dict[int, nn.Parameter] = {}
        self._chunk: list[nn.Parameter] = []
        self._chunk_elements = 0

    # -- buckets that fill during the backward pass ------------------------------------------------------------------------

    def _on_gradient(self, parameter: nn.Parameter, group: int) -> None:
        wrapper = self._wrapper
        if not (wrapper.partition_gradients or wrapper.is_gradient_accumulation_boundary()):
            self._process(parameter, group)  # only adds it up
        elif self._agreed:
            self._held[id(parameter)] = parameter
            self._take_turns()
        else:
            if self._chunk and self._chunk_elements + parameter.numel() > wrapper.reduce_bucket_size // 8:
                self._compare_chunk(last=False)
            self._add_to_chunk(parameter)

    def _add_to_chunk(self, parameter: nn.Parameter) -> None:
        if self._even:
            self._chunk.append(parameter)
            self._chunk_elements += parameter.numel()
        else:
            self._held[id(parameter)] = parameter

    def _on_end(self) -> None:
        wrapper = self._wrapper
        if wrapper.partition_gradients or wrapper.is_gradient_accumulation_boundary():
            if not self._agreed and self._even:
                self._compare_chunk(last=True)
            self._process_remaining()
            # Only now, since ranks without a missing gradient have begun to reduce their buckets before.
            self._expect_reached(reversed(self._places) if not self._even else self._places)
            self._process_remaining()
            self._agreed = True
            self._begin()
        self._epilogue()

    def _process_remaining(self) -> None:
        for parameter in self._order[self._turn :]:
            self._fill(parameter)
            self._process(parameter, self._group_of[id(parameter)])
        self._turn = len(self._order)

    def _take_turns(self) -> None:
        while self._turn < len(self._order) and id(self._order[self._turn]) in self._held:
            parameter = self._held.pop(id(self._order[self._turn]))
            self._turn += 1
            self._process(parameter, self._group_of[id(parameter)])

    def _compare_chunk(self, *, last: bool) -> None:
        """Hand the chunk to DeepSpeed if all ranks have the same one; otherwise hold all gradients from here on."""
        numbers = [self._numbers[id(parameter)] for parameter in self._chunk]
        digest = xxhash.xxh3_64_intdigest(repr((numbers, last)).encode()) >> 1
        mine = torch.tensor([digest, -digest], device=self._places[0][0].device)
        torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, group=self._wrapper.dp_process_group)
        highest, negated_lowest = mine.tolist()
        self._even = highest == -negated_lowest
        for parameter in self._chunk:
            if self._even:
                self._order.append(parameter)
                self._expected.add(id(parameter))
                self._turn += 1
                self._process(parameter, self._group_of[id(parameter)])
            else:
                self._held[id(parameter)] = parameter
        self._chunk, self._chunk_elements = [], 0

    # -- what ranks agree on -------------------------------------------------------------------------------------------------

    def _expect_reached(self, places: Iterable[Place]) -> None:
        """Append to the order those further parameters that have a gradient on any rank. Every rank must call it; ranks exchange
        nothing where all parameters are in the order already."""
        rest = [parameter for parameter, _ in places if id(parameter) not in self._expected]
        reached = self._reached_anywhere(rest)
        self._order.extend(reached)
        self._expected.update(map(id, reached))

    def _reached_anywhere(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of the parameters that have a gradient on any rank. Every rank must call it with the same ones."""
        if not parameters:
            return []
        mine = [self._has_gradient(parameter) for parameter in parameters]
        reached = torch.tensor(mine, dtype=torch.uint8, device=parameters[0].device)
        torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX, group=self._wrapper.dp_process_group)
        return [parameter for parameter, has in zip(parameters, reached.tolist(), strict=True) if has]

    def _has_gradient(self, parameter: nn.Parameter) -> bool:
        if self._has_buckets:
            return parameter.grad is not None or getattr(parameter, "grad_accum", None) is not None
        number, index = self._group_of[id(parameter)], self._index_of[id(parameter)]
        return bool(self._wrapper.fp32_groups_has_gradients[number][index])

    def _fill(self, parameter: nn.Parameter) -> None:
        if not self._has_gradient(parameter):
            parameter.grad = torch.zeros_like(parameter)

    # -- gradients that are reduced after the backward pass ------------------------------------------------------------------

    def _on_reduce(self, *arguments: Any, **settings: Any) -> None:
        self._expect_reached(self._places)
        for parameter in self._order:
            self._fill(parameter)
            if self._wrapper.use_grad_accum_attribute:
                self._wrapper._fill_param_grad_accum_attribute(parameter)
        self._reduce(*arguments, **settings)

    def before_step(self) -> None:
        """Count, in the norm of DeepSpeed's bf16 optimizer, gradients that only other ranks have.

        It reduces all gradients, but the norm by which a rank clips would be that of the gradients which its rows reached.
        """
        if self._has_buckets:
            return
        self._expect_reached(self._places)
        for number, group in enumerate(self._wrapper.bf16_groups):
            for index, parameter in enumerate(group):
                if id(parameter) in self._expected:
                    self._wrapper.fp32_groups_has_gradients[number][index] = True
