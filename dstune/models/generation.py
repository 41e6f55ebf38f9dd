"""Text from a model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def end_tokens(model: Any, stops: Iterable[int]) -> list[int]:
    """Tokens that end a text: those of the model's generation settings, and `stops`."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*several, *stops] if token is not None})


def generate_answers(
    model: nn.Module, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, stops: Iterable[int]
) -> list[str]:
    """The most probable continuation of each prompt (token ids), token by token, without what ends it.

    Greedy, so the same weights give the same text. stops: see `data.stopping`. The model's training mode is put back
    afterwards.
    """
    was_training = model.training
    model.eval()
    generator: Any = model
    device = next(model.parameters()).device
    ends = end_tokens(generator, stops) or None
    answers = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = generator.generate(
                input_ids=torch.tensor([prompt], device=device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                # A model's own sampling settings (SmolLM2: temperature 0.2) would be warned about and not used.
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers.append(tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip())
    model.train(was_training)
    return answers
