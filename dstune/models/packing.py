"""Checks at the start of a run that samples packed into one row do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest accepted difference relative to the largest logit. Contaminated rows of SmolLM2 differ by 35, clean ones by
3e-5 in fp32, at logits of about 30."""
LENGTH = 8
"""Tokens of each sample."""

Forward = Callable[..., Any]


def contamination(forward: Forward, vocabulary: int, device: torch.device) -> tuple[float, torch.dtype]:
    """Measure how far the logits of the second sample in a packed row are from its logits alone.

    Returns the largest difference relative to the largest logit, and the type of the logits. `forward` must be in evaluation
    mode; at ZeRO-3 every rank must call this.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(vocabulary, (2, 1, LENGTH), generator=generator)
    positions = torch.arange(LENGTH)[None]

    def logits(tokens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return forward(input_ids=tokens.to(device), position_ids=position_ids.to(device), use_cache=False).logits

    with torch.no_grad():
        # Two rows, as in training: some attention implementations keep samples apart only in a batch of one row.
        rows, row_positions = torch.cat([first, second], dim=1), torch.cat([positions, positions], dim=1)
        packed = logits(rows.expand(2, -1), row_positions.expand(2, -1))[:1, LENGTH:]
        alone = logits(second, positions)
    return float((packed - alone).abs().max() / alone.abs().max()), alone.dtype
