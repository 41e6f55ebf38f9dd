"""What every head gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

IGNORED = -100
"""Label of a position that is no target."""

Forward = Callable[..., Any]
Batch = Mapping[str, torch.Tensor]

OF_WHOLE_IMAGES = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "image_position_ids")
"""Inputs that do not depend on where the images stand in the rows."""
OF_TOKENS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
MODEL_INPUTS = (*OF_TOKENS, "features", *OF_WHOLE_IMAGES)


@dataclass(frozen=True)
class HeadOutput:
    loss_sum: torch.Tensor
    """Sum of the losses of all targets, scalar fp32 with a graph."""
    weight: torch.Tensor
    """Number of targets, scalar."""
    correct: torch.Tensor
    """Targets that the most probable prediction hits, scalar."""
    rows: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] = field(default_factory=dict)
    """What the task's metrics need of each row, by name, in an evaluation (without gradients):
    tensors [batch, ...], or one tensor of any length a row. `loss` is the sum of its targets' losses, `weight` what they
    count and `correct` how many were hit."""
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further sums over the batch that the task's metrics are made of, scalars without a graph."""


def sums_of(output: HeadOutput) -> dict[str, torch.Tensor]:
    """Return all sums of a batch by name, `loss_sum`, `weight` and `correct` among them."""
    return {"loss_sum": output.loss_sum, "weight": output.weight, "correct": output.correct, **output.sums}


class Head(Protocol):
    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput: ...


class Rows(Protocol):
    """How the rows of a language model are handed to it, where not as they are."""

    whole: bool
    """Whether this rank has all positions of its rows."""

    def model_inputs(
        self, inputs: Batch, labels: torch.Tensor, boundaries: tuple[torch.Tensor, int] | None = None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return what this rank's model gets of `inputs`, and the labels of its positions. boundaries: as `boundaries` found
        them."""

    def boundaries(self, inputs: Batch) -> tuple[torch.Tensor, int] | None:
        """Return where samples begin, where the model is told so by tensors."""

    def original_attention(self) -> AbstractContextManager[None]:
        """Give the model back its own attention, within the block: it then takes rows as they are."""

    def refuse(self, reason: str) -> str:
        """Fall back where logits are not those of the same samples alone: rows go to the model as they are from now on, and what
        to tell of it is returned. Raises UserError where they cannot."""


@runtime_checkable
class LeavesOutLogits(Protocol):
    """A head of a language model that need not compute all logits, if the model does nothing with them but return them."""

    def examine(self, forward: Forward, device: torch.device) -> bool:
        """Try the model and remember whether it does. At ZeRO-3 every rank calls this. Return `examined`."""

    @property
    def examined(self) -> bool:
        """Whether the loss is computed without whole logits."""


@runtime_checkable
class IndexesBatches(Protocol):
    """A head that computes some of its inputs from a batch in host memory, since a device would have to be waited for."""

    def indexed(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return `batch` with these inputs."""


def indexed(head: Head, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the batch as `head` takes it, in host memory."""
    return head.indexed(batch) if isinstance(head, IndexesBatches) else dict(batch)


@runtime_checkable
class GlobalBatchHead(Protocol):
    """A head whose loss of one micro-batch depends on all others of the step (or of the split that is evaluated).

    Before the loss of any of them, `first_pass` runs on each without a graph, with the same random numbers as later, and
    `join` turns what it gave into what the loss of each needs, as further tensors of the batch. See `dstune.trainer.whole_batch`.
    """

    join_evaluation: bool
    """Whether an evaluation needs `join` too, or does with what the head keeps of each row."""

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput: ...

    def first_pass(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]: ...

    def join(self, parts: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Return what each micro-batch needs of the step. parts: of all micro-batches of all ranks, in the step's order, fillers
        last."""


def numbers(sums: Mapping[str, torch.Tensor], read: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the values of scalars, exact. Those on a device are read at once: each read waits for all that was started there.

    read: those that are known already."""
    read = read or {}
    on_device = [name for name, value in sums.items() if not value.is_cpu and name not in read]
    read_values = torch.stack([sums[name].double() for name in on_device]).tolist() if on_device else []
    values = {**read, **dict(zip(on_device, read_values, strict=True))}
    return {name: values[name] if name in values else float(value) for name, value in sums.items()}


def on_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch where the model computes; without waiting for the copies of those in pinned memory. Single
    numbers are for the host and stay there."""
    return {name: value.to(device, non_blocking=True) if value.dim() else value for name, value in batch.items()}


def inputs_of(batch: Batch, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return what of a batch the model itself takes. dtype: of the weights, since some towers take pixels of no other type."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if dtype is not None and "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs
