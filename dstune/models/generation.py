"""Generates text with a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import StoppingCriteriaList

from dstune.core.errors import Problem, UserError


def end_tokens(model: Any, stops: Iterable[int]) -> list[int]:
    """Return the tokens that end a text: those of the model's generation settings, and `stops`. Raises UserError if the settings
    have anything other than token ids."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    tokens = {token for token in [*several, *stops] if token is not None}
    if wrong := [token for token in tokens if not isinstance(token, int)]:
        reason = f"its eos_token_id has {wrong[0]!r}, which is no token"
        raise UserError(Problem("generation_config.json", reason, "give the numbers of tokens", model.name_or_path))
    return sorted(tokens)


def generation_inputs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[Any, dict[str, Any], int]:
    """Return the model whose `generate` has to be called, its inputs, and the length of the output in front of the new tokens.

    input_ids, attention_mask: [batch, sequence], as `padded` gives them.

    A trained prompt is put in place here: `generate` of peft 0.21 gives it other positions than its forward pass does
    under transformers 5, and the answers are other ones from the first token on.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    disabled = "generate" in vars(model)  # peft switches a trained prompt off in this way
    if model.config.is_encoder_decoder:  # its output starts with one token of its own, not with the prompt
        return model, inputs, 1
    if not hasattr(model, "prompt_encoder") or disabled:
        return model, inputs, input_ids.shape[1]
    batch, count = len(input_ids), model.active_peft_config.num_virtual_tokens
    mask = functional.pad(attention_mask, (count, 0), value=1)
    prompt = model.get_prompt(batch)
    if not isinstance(prompt, torch.Tensor):  # keys and values count as tokens that have been read already
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
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stops: Iterable[int],
    *,
    batch_size: int = 1,
    in_step: bool = False,
    one_line: bool = False,
    images: Sequence[Mapping[str, torch.Tensor]] = (),
) -> list[str]:
    """Return the most probable answer to each prompt (token ids), token by token, without special tokens.

    Greedy, so the same weights give the same text; `batch_size` prompts share a forward pass. in_step: all ranks run this
    with equally many prompts, and go on with a batch until all of them are done with theirs (for partitioned weights).
    images: for each prompt what the model gets beside its tokens; then `batch_size` is 1.
    one_line: an answer ends where its first line does. stops: see `data.stopping`. The model's training mode is put back
    afterwards.
    """
    was_training = model.training
    model.eval()
    generator: Any = model
    ends = end_tokens(generator, stops) or None
    answers: list[str] = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            padded_prompts = padded(generator, prompts[start : start + batch_size], tokenizer.pad_token_id)
            speaker, inputs, prompt_length = generation_inputs(generator, **padded_prompts)
            if images:
                inputs |= placed_images(images[start], generator)
            criteria = [_LineEnds(tokenizer, prompt_length)] if one_line else []
            tokens = speaker.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                # Without these, transformers would warn that it ignores a model's sampling settings (SmolLM2: temperature 0.2).
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=in_step,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
            texts = [tokenizer.decode(row[prompt_length:], skip_special_tokens=True).strip() for row in tokens]
            answers += [text.partition("\n")[0].strip() if one_line else text for text in texts]
    model.train(was_training)
    return answers


def placed_images(inputs: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Move a model's image inputs to its device, with pixels in its dtype."""
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    return {name: value.to(device, dtype if name == "pixel_values" else value.dtype) for name, value in inputs.items()}


class _LineEnds:
    """A stopping criterion of transformers: a row is done when a line break follows its first text."""

    def __init__(self, tokenizer: Any, width: int):
        self._tokenizer, self._width = tokenizer, width

    def __call__(self, tokens: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        """Return which rows are done: bool [batch]. tokens: [batch, sequence]."""
        texts = [self._tokenizer.decode(row[self._width :], skip_special_tokens=True) for row in tokens]
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=tokens.device)


def padded(model: Any, prompts: Sequence[list[int]], padding: int) -> dict[str, torch.Tensor]:
    """Pad prompts to tensors: on the left for a decoder, which continues them, on the right for an encoder."""
    width = max(map(len, prompts))
    pads_left = not model.config.is_encoder_decoder
    rows, masks = [], []
    for prompt in prompts:
        fill = width - len(prompt)
        rows.append([padding] * fill + prompt if pads_left else prompt + [padding] * fill)
        masks.append([0] * fill + [1] * len(prompt) if pads_left else [1] * len(prompt) + [0] * fill)
    device = next(model.parameters()).device
    return {
        "input_ids": torch.tensor(rows, dtype=torch.long, device=device),
        "attention_mask": torch.tensor(masks, dtype=torch.long, device=device),
    }
