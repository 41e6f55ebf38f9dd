"""Interfaces and outputs of heads."""

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
    """Values of each row for the task's metrics, by name, in an evaluation (without gradients):
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
    """Changes the inputs of a language model's rows before its forward pass, for models or ranks that need another form."""

    whole: bool
    """Whether this rank has all positions of its rows."""

    def model_inputs(
        self, inputs: Batch, labels: torch.Tensor, boundaries: tuple[torch.Tensor, int] | None = None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the inputs of this rank's model for `inputs`, and the labels of its positions. boundaries: from `boundaries`."""

    def boundaries(self, inputs: Batch) -> tuple[torch.Tensor, int] | None:
        """Return where samples begin, and the longest one, if the model needs this as tensors; else None."""

    def original_attention(self) -> AbstractContextManager[None]:
        """Restore the model's original attention, which takes unchanged rows, within the block."""

    def refuse(self, reason: str) -> str:
        """Fall back to unchanged rows from now on, because logits differ from those of the same samples alone; return the message
        for the user. Raises UserError if that is impossible."""


@runtime_checkable
class LeavesOutLogits(Protocol):
    """A head of a language model that can skip computing all logits, if the model returns them unchanged."""

    def examine(self, forward: Forward, device: torch.device) -> bool:
        """Test whether the model returns its logits unchanged, and return `examined`. At ZeRO-3 every rank must call this."""

    @property
    def examined(self) -> bool:
        """Whether the loss is computed without whole logits."""


@runtime_checkable
class IndexesBatches(Protocol):
    """A head that computes some inputs from a batch in host memory, since on a device the host would have to wait for them."""

    def indexed(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return `batch` with these inputs."""


def indexed(head: Head, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the batch with the inputs that `head` needs, in host memory."""
    return head.indexed(batch) if isinstance(head, IndexesBatches) else dict(batch)


@runtime_checkable
class GlobalBatchHead(Protocol):
    """A head whose loss of one micro-batch depends on all others of the step (or of the split that is evaluated).

    Before the first loss, `first_pass` runs on each micro-batch without a graph, with the random numbers of the later pass, and
    `join` turns its results into additional inputs for the loss of each. See `dstune.trainer.whole_batch`.
    """

    join_evaluation: bool
    """Whether an evaluation needs `join` too, or does with what the head keeps of each row."""

    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput: ...

    def first_pass(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]: ...

    def join(self, parts: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Return the additional inputs of each micro-batch. parts: from `first_pass`, for all micro-batches of all ranks, in the
        step's order, fillers last."""


def numbers(sums: Mapping[str, torch.Tensor], read: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the exact values of scalars. All those on a device are read together, since each read waits for the device.

    read: values that were read already."""
    read = read or {}
    on_device = [name for name, value in sums.items() if not value.is_cpu and name not in read]
    read_values = torch.stack([sums[name].double() for name in on_device]).tolist() if on_device else []
    values = {**read, **dict(zip(on_device, read_values, strict=True))}
    return {name: values[name] if name in values else float(value) for name, value in sums.items()}


def on_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Copy the tensors of a batch to `device`, without waiting for copies from pinned memory. Scalars are for the host and stay
    there."""
    return {name: value.to(device, non_blocking=True) if value.dim() else value for name, value in batch.items()}


def inputs_of(batch: Batch, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the model's inputs in a batch. dtype: of the weights, for pixels, since some towers accept no other dtype."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if dtype is not None and "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs
