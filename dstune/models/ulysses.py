"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv:2309.14509): a few ranks share the positions of each row.

Every layer except attention looks at one position at a time, so each rank computes its part of the positions alone. For
attention, the ranks of a group exchange their states: each receives some of the heads with all positions, and afterwards its own
positions with all heads. Packed samples stay apart, since attention is called for each sample separately.

The loss needs no change: a rank has the targets of its own positions, and losses are summed over all ranks anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.nn.functional as functional
from transformers import PreTrainedModel

from dstune.config.parallel_rules import heads_problem, ranks_problem, repeats_of_keys, uncut_problem
from dstune.core.distributed import World, own_group
from dstune.core.errors import Problem, UserError
from dstune.models.attention import SpanAttention
from dstune.models.heads.base import IGNORED
from dstune.models.row_length import varying_rope
from dstune.models.spans import SPANS, attention_problem, no_mask, spans_of


class SequenceCut(SpanAttention):
    """This rank's part of every row, and the group of ranks that have the other parts."""

    NAME = "dstune_ulysses"
    title = "samples one by one, positions shared by ranks"
    whole = False

    def __init__(self, world: World, parts: int):
        """Create the groups of ranks that share rows. Every rank must call it.

        parts: ranks in a group; they have consecutive numbers, so that a group is on one node. Raises UserError if the ranks cannot
        be divided into such groups.
        """
        if problem := ranks_problem(world.size, parts):
            raise UserError(problem)
        self.parts, self.part = parts, world.rank % parts
        self._group, _ = own_group([range(first, first + parts) for first in range(0, world.size, parts)], world.rank)

    @classmethod
    def of(cls, parts: int, world: World) -> SequenceCut | None:
        """Return a cut for groups of `parts` ranks; None if `parts` is 1. From then on the groups of `world` read the rows."""
        cut = cls(world, parts) if parts > 1 else None
        world.read_in_groups(parts)
        return cut

    def install(self, model: PreTrainedModel) -> None:
        """Let `model` compute attention over all parts. Raises UserError for a model that cannot be cut."""
        refuse(model, self.parts)
        super().install(model)

    def model_inputs(
        self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, boundaries: Any = None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the model's inputs and the labels of this rank's positions.

        inputs: input_ids [rows, positions], with position_ids for packed rows or attention_mask (padding after the tokens).
        labels: the target of each position, [rows, positions].
        """
        ids = inputs["input_ids"]
        rows, width = ids.shape
        if "position_ids" in inputs:
            positions = inputs["position_ids"]
        else:
            positions = torch.arange(width, device=ids.device).expand(rows, -1)
        spans = spans_of(inputs)
        padding = -width % self.parts
        if padding:
            ids, labels = functional.pad(ids, (0, padding)), functional.pad(labels, (0, padding), value=IGNORED)
            positions = torch.cat([positions, torch.arange(padding, device=ids.device).expand(rows, -1)], dim=1)
        size = (width + padding) // self.parts
        span = slice(self.part * size, (self.part + 1) * size)
        local_inputs = {
            "input_ids": ids[:, span],
            "position_ids": positions[:, span],
            "attention_mask": no_mask(ids.device),
        }
        return local_inputs | {SPANS: spans}, labels[:, span]

    def refuse(self, reason: str) -> str:
        """Raises UserError: without this attention, a rank would see only its part of each row."""
        reason = f"rows that ranks share have other logits than their samples alone ({reason})"
        raise UserError(Problem("parallel", reason, "parallel=none, or another model", "ulysses"))

    def redistribute_inputs(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Exchange all heads at this rank's positions for some heads at all positions."""
        query, key, value = states
        repeats = repeats_of_keys(key.shape[1], self.parts)
        if repeats > 1:
            key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        return tuple(map(self._to_heads, (query, key, value)))

    def redistribute_outputs(self, attended: torch.Tensor) -> torch.Tensor:
        return self._to_positions(attended)

    def _to_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Exchange [rows, heads, own positions, size] -> [rows, own heads, positions, size]."""
        rows, heads, positions, size = states.shape
        parts = states.view(rows, self.parts, heads // self.parts, positions, size).transpose(0, 1)
        received = _Exchange.apply(parts.contiguous(), self._group)
        return received.permute(1, 2, 0, 3, 4).reshape(rows, heads // self.parts, -1, size)

    def _to_positions(self, states: torch.Tensor) -> torch.Tensor:
        """Exchange [rows, own heads, positions, size] -> [rows, heads, own positions, size]."""
        rows, heads, positions, size = states.shape
        parts = states.view(rows, heads, self.parts, positions // self.parts, size).permute(2, 0, 1, 3, 4)
        received = _Exchange.apply(parts.contiguous(), self._group)
        return received.transpose(0, 1).reshape(rows, -1, positions // self.parts, size)


class _Exchange(torch.autograd.Function):
    """Returns, as part i, the part for this rank that rank i of the group had. The exchange is its own inverse and gradient."""

    @staticmethod
    def forward(context: Any, parts: torch.Tensor, group: Any) -> torch.Tensor:
        context.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return _exchanged(gradient.contiguous(), context.group), None


def _exchanged(parts: torch.Tensor, group: Any) -> torch.Tensor:
    received = torch.empty_like(parts)
    torch_dist.all_to_all_single(received, parts, group=group)
    return received


def refuse(model: PreTrainedModel, parts: int) -> None:
    """Raises UserError if `parts` ranks cannot share the rows of `model`."""
    architecture = model.config.get_text_config()
    kind = architecture.model_type
    if reason := attention_problem(model):
        raise UserError(uncut_problem(kind, reason))
    if kinds := varying_rope(architecture):
        named_kinds = ", ".join(sorted(kinds))
        reason = f"its positions ({named_kinds}) depend on the length of the row, and a rank sees a part of it"
        raise UserError(uncut_problem(kind, reason))
    if getattr(architecture, "layerdrop", 0):
        reason = "it leaves out layers at random, where the other ranks of a row would wait"
        raise UserError(uncut_problem(kind, reason, "model.config_overrides={layerdrop: 0}"))
    if problem := heads_problem(architecture.num_attention_heads, parts):
        raise UserError(problem)
