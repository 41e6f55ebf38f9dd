"""What every head gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

IGNORED = -100
"""Label of a position that is no target."""

Forward = Callable[..., Any]
Batch = Mapping[str, torch.Tensor]

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "features")


@dataclass(frozen=True)
class HeadOutput:
    loss_sum: torch.Tensor
    """Sum of the losses of all targets, scalar fp32 with a graph."""
    weight: torch.Tensor
    """Number of targets, scalar."""
    correct: torch.Tensor
    """Targets that the most probable prediction hits, scalar."""
    rows: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] = field(default_factory=dict)
    """What the task's metrics need of each row, by name: tensors [batch, ...], or one tensor of any length a row."""


class Head(Protocol):
    def __call__(self, forward: Forward, batch: Batch) -> HeadOutput: ...


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    """What of a batch the model itself takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
