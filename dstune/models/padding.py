"""Checks at the start of a run that the outputs of a row do not depend on padding."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dstune.config.architectures import row_limit

TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Largest accepted difference from the row alone, relative to the root mean square of all positions. Other shapes round
differently. Among 600 tiny models that hide padding (`benchmarks/padding.py`), the largest differences were 4e-6, 0.014 and 0.2;
among those that read it, the smallest was 0.17 in fp32. TF32, which has the bound of fp32, rounds as fp16 does."""
CONTENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.02}
"""The same if only the tokens in the padding change: shapes are equal, so hidden tokens contribute exactly 0. The difference was
0 in all models that hide padding, in every format, and 0.1 or more in the others."""
HALF_PRECISION_QUANTILE = 0.75
"""Quantile over positions that is compared in half precision: at a few positions, rounding makes a router choose another expert,
which is no fault."""
BODY = "states of the body"
LENGTHS = (9, 14, 21, 29)
"""Tokens of the row that is compared and of the other rows in its batch, without special tokens."""
WIDER = 3
"""Positions of padding after the longest row."""
DECODED = 4
"""Tokens of a row that the decoder of an encoder-decoder reads."""

Forward = Callable[..., Any]


@dataclass(frozen=True)
class PaddingDifference:
    """Differences of a row's outputs and hidden states, relative to the root mean square of all positions (for classes: of all
    rows)."""

    from_alone: float
    """In a batch with padding and longer rows, from the row alone."""
    from_content: float
    """In a padded batch, from the same batch with other tokens in the padding."""
    dtype: torch.dtype

    @property
    def reads_padding(self) -> bool:
        """Whether the differences are larger than rounding explains."""
        tolerated = self.from_alone <= TOLERANCE[self.dtype] and self.from_content <= CONTENT_TOLERANCE[self.dtype]
        return not tolerated  # NaN counts as reading padding

    @property
    def largest(self) -> float:
        return max(self.from_alone, self.from_content, key=lambda value: (value != value, value))


def measure_padding(
    model: PreTrainedModel, forward: Forward, rows: Sequence[list[int]], pad_token_id: int, device: torch.device
) -> PaddingDifference:
    """Compute the first of `rows` alone, and twice in a padded batch with the others; return how far the results differ.

    model: the model that `forward` runs, in evaluation mode. At ZeRO-3 every rank must call this.
    """
    width = max(map(len, rows)) + WIDER
    padded = torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    row = padded[:1, : len(rows[0])]
    with torch.no_grad(), _same_attention(model):
        alone = _outputs(model, forward, row, torch.ones_like(row), device)
        beside = _outputs(model, forward, padded, mask.long(), device)
        changed = _outputs(model, forward, padded.where(mask, rows[-1][LENGTHS[0] // 2]), mask.long(), device)
    differences = [_apart(alone[name][0], beside[name]) for name in alone.keys() & beside.keys()]
    # Some heads find the last token by comparing with the padding token, so changed padding is compared in the body only.
    content = _apart(changed[BODY][0, : len(rows[0])], beside[BODY]) if BODY in beside else 0.0
    dtype = next(iter(alone.values())).dtype
    return PaddingDifference(max(differences, key=lambda value: (value != value, value)), content, dtype)


def rows_of_proof(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[list[int]]:
    """Draw rows of tokens that are not special, inside the special tokens of a pair of texts: some heads look for separators."""
    special = {*tokenizer.all_special_ids}
    plain = [token for token in range(len(tokenizer)) if token not in special]
    start, end = [], []
    if tokenizer.sep_token_id is not None:
        *start, last = tokenizer("a", "a")["input_ids"]
        end = [last]
    room = (row_limit(model.config.to_dict()) or sys.maxsize) - len(start) - len(end) - WIDER
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(plain), (min(length, room),), generator=generator).tolist() for length in LENGTHS]
    return [[*start, *(plain[index] for index in row), *end] for row in drawn]


def _outputs(
    model: PreTrainedModel, forward: Forward, tokens: torch.Tensor, mask: torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the outputs of the model and of its body by name, [rows, positions or classes, ...]. Classes alone would not do: a new
    head may shrink a difference until it looks like rounding."""
    states: dict[str, torch.Tensor] = {}

    def keep(module: Any, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if isinstance(state, torch.Tensor):
            states[BODY] = state

    inputs = {"input_ids": tokens, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :DECODED]
    handle = model.base_model.register_forward_hook(keep)
    try:
        output = forward(**{name: value.to(device) for name, value in inputs.items()})
    finally:
        handle.remove()
    tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor) and value.dim() > 1}
    return states | {name: value for name, value in tensors.items() if value.is_floating_point()}


def _apart(alone: torch.Tensor, beside: torch.Tensor) -> float:
    """Return the largest difference between a row alone, [positions, ...] or [classes], and the first row of the batch `beside`; in
    half precision, the quantile `HALF_PRECISION_QUANTILE` of the differences. Entries that are infinite alone (a masked
    class) are not compared."""
    if alone.dim() == 1:
        alone, beside = alone[None], beside[:, None]  # as if it were a position
    first = beside[0, : len(alone)]
    if first.shape != alone.shape:
        return 0.0
    finite = alone.isfinite()
    difference = torch.where(finite, first.float() - alone.float(), 0.0).flatten(1).norm(dim=1)
    size = torch.where(finite, beside[:, : len(alone)].float(), 0.0).square().sum() / len(beside) / len(alone)
    quantile = 1.0 if alone.dtype is torch.float32 else HALF_PRECISION_QUANTILE
    return float(difference.quantile(quantile) / size.sqrt().clamp(min=1e-12))


@contextmanager
def _same_attention(model: PreTrainedModel) -> Iterator[None]:
    """Restore the sparse attention of BigBird, which would otherwise switch to full attention for good at the first short row."""
    attention_type = getattr(model.base_model, "attention_type", None)
    try:
        yield
    finally:
        if getattr(model.base_model, "attention_type", None) != attention_type:
            model.base_model.set_attention_type(attention_type)
