"""Text from a model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn


def end_tokens(model: Any, stops: Iterable[int]) -> list[int]:
    """Tokens that end a text: those of the model's generation settings, and `stops`."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*several, *stops] if token is not None})


def generation_inputs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[Any, dict[str, Any], int]:
    """(the model whose `generate` is to be called, its inputs, length of what stands in front of the new tokens in its answer)

    input_ids, attention_mask: [batch, sequence], padded on the left.

    A trained prompt is put in place here: `generate` of peft 0.21 gives it other positions than its forward pass does
    under transformers 5, and the answers are other ones from the first token on.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    disabled = "generate" in vars(model)  # how peft switches a trained prompt off
    if not hasattr(model, "prompt_encoder") or disabled:
        return model, given, input_ids.shape[1]
    batch, count = len(input_ids), model.active_peft_config.num_virtual_tokens
    mask = functional.pad(attention_mask, (count, 0), value=1)
    prompt = model.get_prompt(batch)
    if not isinstance(prompt, torch.Tensor):  # keys and values: as if so many tokens had been read already
        rows = functional.pad(input_ids, (count, 0))
        return (
            model.get_base_model(),
            {"input_ids": rows, "attention_mask": mask, "past_key_values": prompt},
            rows.shape[1],
        )
    words = model.word_embeddings(input_ids)
    embeddings = torch.cat([prompt.to(words.dtype), words], dim=1)
    return model.get_base_model(), {"inputs_embeds": embeddings, "attention_mask": mask}, 0


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
            ids = torch.tensor([prompt], device=device)
            speaker, inputs, width = generation_inputs(model, ids, torch.ones_like(ids))
            tokens = speaker.generate(
                **inputs,
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
            answers.append(tokenizer.decode(tokens[0, width:], skip_special_tokens=True).strip())
    model.train(was_training)
    return answers
