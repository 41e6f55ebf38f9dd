"""Writes the answers to a batch of prompts with `generate` of transformers, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import GenerationConfig, StoppingCriteriaList

from dstune.core.errors import Problem, UserError
from dstune.generation.batch import pad


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


@dataclass(frozen=True)
class Decoding:
    """How texts are written, token by token."""

    max_new_tokens: int
    ends: Collection[int]
    """Tokens that end a text."""
    padding: int
    temperature: float = 0.0
    """0 always takes the most probable token; otherwise torch's generator draws."""
    top_p: float | None = 1.0
    """None for the model's own setting."""
    top_k: int = 0


def write_tokens(
    model: Any,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    *,
    images: Mapping[str, torch.Tensor] | None = None,
    in_step: bool = False,
    is_over: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt (token ids), padded behind the end.

    The one place that calls `generate` of transformers, which knows encoder-decoders and every kind of cache.

    images: what the model gets beside the tokens of the only prompt. in_step: all ranks run this and go on until all of them are
    done (for partitioned weights). is_over: called after every token with the number of a row and its new tokens, padding behind
    its end included; returns whether the row is done.
    """
    with torch.no_grad():
        speaker, inputs, width = generation_inputs(model, **padded(model, prompts, decoding.padding))
    inputs |= placed_images(images, model) if images else {}
    start = speaker.generation_config.decoder_start_token_id
    # Values that greedy decoding ignores are set to their neutral ones; those of the model would be warned about.
    choice: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if decoding.temperature:
        choice = {
            "do_sample": True,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
        }
    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(decoding.ends) or None,
        pad_token_id=decoding.padding,
        decoder_start_token_id=getattr(speaker.config, "decoder_start_token_id", None) if start is None else start,
        **choice,
    )
    criteria = [] if is_over is None else [_RowEnds(is_over, width)]
    tokens = speaker.generate(
        **inputs, generation_config=settings, synced_gpus=in_step, stopping_criteria=StoppingCriteriaList(criteria)
    )
    written: list[list[int]] = tokens[:, width:].tolist()
    return written


class _RowEnds:
    """A stopping criterion of transformers that decides for each row separately."""

    def __init__(self, is_over: Callable[[int, list[int]], bool], width: int):
        self._is_over, self._width = is_over, width

    def __call__(self, tokens: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        """Return which rows are done: bool [batch]. tokens: [batch, sequence]."""
        rows = enumerate(tokens[:, self._width :].tolist())
        return torch.tensor([self._is_over(number, row) for number, row in rows], device=tokens.device)


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

    def text_of(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text.lstrip()

    was_training = model.training
    model.eval()
    decoding = Decoding(max_new_tokens, end_tokens(model, stops), tokenizer.pad_token_id)
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        rows = write_tokens(
            model,
            prompts[start : start + batch_size],
            decoding,
            images=images[start] if images else None,
            in_step=in_step,
            is_over=(lambda row, ids: "\n" in text_of(ids)) if one_line else None,
        )
        texts = map(text_of, rows)
        answers += [(text.partition("\n")[0] if one_line else text).strip() for text in texts]
    model.train(was_training)
    return answers


def write_texts(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float
) -> list[str]:
    """Return what a model writes after each prompt (token ids), computed together, without special tokens.

    temperature: 0 takes the most probable tokens; otherwise torch's generator draws.
    """
    decoding = Decoding(max_new_tokens, end_tokens(model, ()), tokenizer.pad_token_id, temperature, top_p=None)
    rows = write_tokens(model, prompts, decoding)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]


def placed_images(inputs: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Move a model's image inputs to its device, with pixels in its dtype."""
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    return {name: value.to(device, dtype if name == "pixel_values" else value.dtype) for name, value in inputs.items()}


def padded(model: Any, prompts: Sequence[list[int]], padding: int) -> dict[str, torch.Tensor]:
    """Pad prompts to tensors: on the left for a decoder, which continues them, on the right for an encoder."""
    device = next(model.parameters()).device
    ids, mask = pad(prompts, padding, device, on_left=not model.config.is_encoder_decoder)
    return {"input_ids": ids, "attention_mask": mask}
