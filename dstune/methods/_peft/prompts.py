"""Adds a trained prompt to a frozen model: parameters in front of the row or of each layer's keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError, first_line
from dstune.models.load import load_tokenizer, new_weights
from dstune.zero.parts import gathered

COMMON_TOKENS = 5000
"""A prompt without a text starts from random tokens among the first of the vocabulary. These are the most common ones if merges
were learnt in order of frequency (Lester et al. 2021 draw from the 5,000 most common)."""


def add_prompt(name: str, settings: Any, positions: int, model: PreTrainedModel, config: RunConfig) -> nn.Module:
    """Return the frozen model with a trained prompt in front. Every rank must call it. Raises UserError if it cannot have one."""
    from dstune.models.peft_import import peft

    new = [
        parameter_name
        for parameter_name in new_weights(model).parameters
        if not {"classifier", "score"} & set(parameter_name.split("."))
    ]
    if new:
        reason = f"{', '.join(new[:2])} of {type(model).__name__} are new and have to be trained, which it cannot"
        raise UserError(Problem("method", reason, "method=lora", name))
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions_needed = config.data.max_length + positions
    if longest is not None and positions_needed > longest:
        reason = (
            f"rows of this length and the trained prompt take {positions_needed} positions, and the model has {longest}"
        )
        fix = f"data.max_length={longest - positions_needed + config.data.max_length}"
        raise UserError(Problem("data.max_length", reason, fix, str(config.data.max_length)))
    try:
        adapted: Any = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except (ValueError, AttributeError, KeyError) as error:
        reason = f"{type(model).__name__} takes no {name}: {first_line(error)}"
        raise UserError(Problem("method", reason, "method=lora", name)) from error
    adapted.prompt_encoder.to(model.dtype)  # as peft does with adapters on layers
    return adapted


def start_at_tokens(adapted: Any, count: int, text: str | None, config: RunConfig) -> None:
    """Start the prompt from embeddings of tokens: peft's first values have a deviation of 1, embeddings one of about 0.02."""
    words: nn.Parameter = adapted.word_embeddings.weight
    with gathered([words]), torch.no_grad():
        if text:
            ids = load_tokenizer(config.model)(text, add_special_tokens=False)["input_ids"]
            chosen = torch.tensor([ids[place % len(ids)] for place in range(count)])
        else:
            generator = torch.Generator().manual_seed(config.trainer.seed)
            chosen = torch.randint(min(COMMON_TOKENS, len(words)), (count,), generator=generator)
        embedding = adapted.prompt_encoder["default"].embedding.weight
        embedding.copy_(words[chosen.to(words.device)])
