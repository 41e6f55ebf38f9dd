"""Passes the spans of samples in packed rows from the head of a language model to its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from dstune.config.parallel_rules import CAPPED
from dstune.core.errors import Problem, UserError

SPANS = "dstune_spans"
"""Keyword of a forward pass with the spans. transformers passes unknown keywords on to the attention function, also when a layer is
recomputed in the backward pass."""

Spans = tuple[tuple[tuple[int, int], ...], ...]
"""(first position, end) of each sample, for each row; samples do not overlap."""


def spans_of(inputs: Mapping[str, torch.Tensor]) -> Spans:
    """Find the spans of samples. inputs: input_ids [rows, width] with position_ids of packed rows, which restart at 0 with each
    sample, or with attention_mask, whose padding comes after the tokens and belongs to no sample."""
    rows, width = inputs["input_ids"].shape
    if "position_ids" not in inputs:
        return tuple(((0, length),) for length in inputs["attention_mask"].sum(dim=1).tolist())
    starts: list[list[int]] = [[] for _ in range(rows)]
    for row, column in (inputs["position_ids"] == 0).nonzero().tolist():
        starts[row].append(column)
    return tuple(tuple(zip(of_row, [*of_row[1:], width], strict=True)) for of_row in starts)


def no_mask(device: torch.device) -> torch.Tensor:
    """Return the attention_mask of a forward pass with spans: four dimensions, so that transformers uses it unchanged and builds no
    mask itself."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def with_spans(inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, spans: Any) -> dict[str, Any]:
    """Return the inputs of a model whose attention finds its samples by `spans`. labels: [rows, width]"""
    model_inputs = dict(inputs) | {"attention_mask": no_mask(labels.device), SPANS: spans}
    if "position_ids" not in inputs:  # some models would derive them from the mask
        rows, width = labels.shape
        model_inputs["position_ids"] = torch.arange(width, device=labels.device).expand(rows, -1)
    return model_inputs


def pop_spans(module: torch.nn.Module, mask: torch.Tensor | None, keywords: dict[str, Any]) -> Spans | None:
    """Pop the spans from the keywords of an attention function; None for a forward pass without spans. Raises UserError if the
    model's layers have dropped them."""
    spans = keywords.pop(SPANS, None)
    if spans is None and mask is not None and mask.shape == (1, 1, 1, 1):
        reason = f"the layers of this model do not tell {type(module).__name__} where samples begin"
        raise UserError(Problem("model.attention", reason, "model.attention=sdpa, and parallel=none"))
    return spans


def window_of(module: torch.nn.Module, keywords: Mapping[str, Any]) -> int | None:
    """Return how far back positions of an attention layer look, itself included. keywords: of transformers' call of its
    attention."""
    # What is passed counts: EXAONE's layers all hold a window, and those without one pass None.
    return keywords["sliding_window"] if "sliding_window" in keywords else getattr(module, "sliding_window", None)


SILENT = {"nemotron"}
"""Model types whose layers drop keywords before the attention function."""


def attention_problem(model: PreTrainedModel) -> str | None:
    """Return why this model's attention cannot be computed for each sample separately; None if it can."""
    architecture = model.config.get_text_config()
    if not (getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)):
        return "its attention in transformers cannot be replaced"
    if getattr(architecture, "attn_logit_softcapping", None):
        return CAPPED
    if architecture.model_type in SILENT:
        return "its layers do not tell their attention where samples begin"
    others = set(getattr(architecture, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if (
        others
        or getattr(architecture, "attention_chunk_size", None)
        or getattr(architecture, "attn_temperature_tuning", 0)
    ):
        layers = ", ".join(sorted(others)) or "attention in chunks"
        return f"its layers ({layers}) look at a row in a way of their own"
    return None


CHANGES_SCORES = ("s_aux", "sinks", "position_bias", "attention_bias", "alibi", "softcap", "indices", "block_indices")
"""Keywords by which models in transformers 5 let an attention function do more than weigh values by causal scores."""


def refuse_unknown(module: torch.nn.Module, keywords: Mapping[str, Any]) -> None:
    """Raise UserError for a model that changes attention scores in a way that this implementation would silently leave out."""
    unknown = [name for name in CHANGES_SCORES if keywords.get(name) is not None]
    causal = keywords.get("is_causal")
    if causal is False or (causal is None and getattr(module, "is_causal", True) is False):
        unknown.append("attention to later positions")
    if unknown:
        reason = f"{type(module).__name__} has {', '.join(unknown)}, which attention sample by sample does not support"
        raise UserError(Problem("model.attention", reason, "model.attention=sdpa, and parallel=none"))
