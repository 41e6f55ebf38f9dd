"""Where the samples of a row begin and end, from the head of a language model to its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

SPANS = "dstune_spans"
"""Keyword of a forward pass that tells them. transformers hands keywords that it does not know down to the attention function,
also when a layer is computed again in the backward pass."""

Spans = tuple[tuple[tuple[int, int], ...], ...]
"""(first position, position behind the last) of each sample, for each row; they do not overlap."""


def spans_of(inputs: Mapping[str, torch.Tensor]) -> Spans:
    """inputs: input_ids [rows, width] with position_ids of packed rows, which restart at 0 with each sample, or with
    attention_mask, whose padding is behind the tokens and belongs to no sample."""
    rows, width = inputs["input_ids"].shape
    if "position_ids" not in inputs:
        return tuple(((0, length),) for length in inputs["attention_mask"].sum(dim=1).tolist())
    starts: list[list[int]] = [[] for _ in range(rows)]
    for row, column in (inputs["position_ids"] == 0).nonzero().tolist():
        starts[row].append(column)
    return tuple(tuple(zip(of_row, [*of_row[1:], width], strict=True)) for of_row in starts)


def no_mask(device: torch.device) -> torch.Tensor:
    """The attention_mask of a forward pass that is told spans: of four dimensions, so that it is taken as it is, and none of the
    model's own is made."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def window_of(module: torch.nn.Module, keywords: Mapping[str, Any]) -> int | None:
    """How far back positions of an attention layer look, itself included. keywords: of transformers' call of its attention."""
    # What is passed counts: EXAONE's layers all hold a window, and those without one pass None.
    return keywords["sliding_window"] if "sliding_window" in keywords else getattr(module, "sliding_window", None)


def attention_problem(model: PreTrainedModel) -> str | None:
    """Why attention of this model cannot be computed for each sample on its own, if so."""
    architecture = model.config.get_text_config()
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)):
        return "its attention in transformers cannot be replaced"
    if getattr(architecture, "attn_logit_softcapping", None):
        return "its attention caps its scores, which the fused attention of torch does not do"
    others = set(getattr(architecture, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if (
        others
        or getattr(architecture, "attention_chunk_size", None)
        or getattr(architecture, "attn_temperature_tuning", 0)
    ):
        layers = ", ".join(sorted(others)) or "attention in chunks"
        return f"its layers ({layers}) look at a row in a way of their own"
    return None


def refuse_unknown(keywords: Mapping[str, Any]) -> None:
    """Of what a model adds to its scores nothing may be left out silently."""
    unknown = [name for name in ("s_aux", "position_bias") if keywords.get(name) is not None]
    assert not unknown, f"attention with {unknown} of its own, which `attention_problem` does not know"
