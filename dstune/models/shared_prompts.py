"""Puts several answers to a prompt into one row that has the prompt only once, so that its hidden states are computed once.

A row has all prompts and then all answers, end to end and without padding. The positions of an answer continue those of its
prompt, and its attention sees the prompt and the answer's earlier tokens. The rest of a layer looks at one token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dstune.core.errors import UserError
from dstune.models.attention import implementations_of
from dstune.models.packing import TOLERANCE, Forward
from dstune.models.spans import SPANS, attention_problem, no_mask, pop_spans, refuse_unknown, window_of

NAME = "dstune_shared_prompts"
"""Name of the attention function in transformers' registry."""
LONGEST_PROOF = 600
"""Most tokens of a prompt in the check before a run: enough for a window of 512."""


@dataclass(frozen=True)
class SharedPrompts:
    """Layout of prompts and answers in a row."""

    positions: Tensor
    """Position of each token in its prompt with answer, int64 [1, tokens]."""
    prompt_places: Tensor
    """Indices of the prompts' tokens in the row, int64 [prompts, longest prompt]; 0 after the end of a prompt."""
    answer_places: Tensor
    """The same for answers, [answers, longest answer]."""
    prompt_lengths: Tensor
    """Length of each answer's prompt, int64 [answers]."""
    prompt_ends: Tensor
    """Index in the row of the last token of each answer's prompt, int64 [answers]."""
    sizes: tuple[int, ...]
    """Number of answers of each prompt."""
    order: Tensor
    """Index of each token in `prompt_places` and `answer_places`, flattened and concatenated, int64 [tokens]."""
    masks: dict[int | None, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    """Masks of prompts and of answers (`_make_masks`) by window; layers with the same window share them."""

    @classmethod
    def build(cls, prompts: Sequence[int], sizes: Sequence[int], answers: Sequence[int], device: Any) -> SharedPrompts:
        """Lay out a row. prompts: length of each prompt; sizes: number of answers of each prompt; answers: length of each answer,
        in the order of the prompts."""
        prompt_lengths, answer_lengths = (torch.tensor(list(lengths)) for lengths in (prompts, answers))
        of_prompt = torch.arange(len(prompts)).repeat_interleave(torch.tensor(list(sizes)))
        prompt_places, prompt_columns, is_prompt = _places(prompt_lengths, 0)
        answer_places, answer_columns, is_answer = _places(answer_lengths, int(prompt_lengths.sum()))
        behind = prompt_lengths[of_prompt]
        positions = torch.cat([prompt_columns[is_prompt], (answer_columns + behind[:, None])[is_answer]])
        order = torch.cat([is_prompt.flatten(), is_answer.flatten()]).nonzero().squeeze(1)
        ends = (prompt_lengths.cumsum(0) - 1)[of_prompt]
        return cls(
            positions=positions[None].to(device),
            prompt_places=prompt_places.to(device),
            answer_places=answer_places.to(device),
            prompt_lengths=behind.to(device),
            prompt_ends=ends.to(device),
            sizes=tuple(sizes),
            order=order.to(device),
        )

    def predecessors(self, width: int) -> Tensor:
        """Return the indices whose hidden states predict the first `width` tokens of each answer, int64 [answers, width]."""
        starts = self.answer_places[:, :1] if self.answer_places.shape[1] else self.prompt_ends[:, None]
        later = starts + torch.arange(width - 1, device=starts.device)
        return torch.cat([self.prompt_ends[:, None], later], dim=1)

    def model_inputs(self, tokens: Tensor) -> dict[str, Any]:
        """Return the model's inputs. tokens: the row's, int64 [1, tokens]."""
        return {
            "input_ids": tokens,
            "attention_mask": no_mask(tokens.device),
            "position_ids": self.positions,
            SPANS: self,
        }

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Compute attention, [1, tokens, heads, size].

        query, key, value: [1, heads, tokens, size]; key and value may have fewer heads.
        """
        if window not in self.masks:
            self.masks[window] = self._make_masks(window)
        of_prompts, of_answers = self.masks[window]
        states = [_select(part, self.prompt_places) for part in (query, key, value)]
        attended = [sdpa_attention_forward(module, *states, of_prompts, 0.0, scale)[0]]
        if self.answer_places.numel():
            answer_states = [_select(part, self.answer_places) for part in (query, key, value)]
            answer_context = [torch.cat([self._repeat(states[part]), answer_states[part]], dim=2) for part in (1, 2)]
            attended.append(
                sdpa_attention_forward(module, answer_states[0], *answer_context, of_answers, 0.0, scale)[0]
            )
        return torch.cat([part.flatten(0, 1) for part in attended]).index_select(0, self.order)[None]

    def _repeat(self, states: Tensor) -> Tensor:
        """Repeat [prompts, ...] as [answers, ...]. Views, so that the gradients of the copies are summed in a fixed order on any
        device."""
        return torch.cat([row[None].expand(size, *row.shape) for row, size in zip(states, self.sizes, strict=True)])

    def _make_masks(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """Return the masks, bool: of prompts [prompt, prompt] (None if the window hides nothing, so that causal attention will do),
        and of answers [answers, 1, longest answer, longest prompt + longest answer]."""
        device = self.positions.device
        prompt, answer = (
            torch.arange(places.shape[1], device=device) for places in (self.prompt_places, self.answer_places)
        )
        of_prompts = None
        if window is not None and window < len(prompt):
            distance = prompt[:, None] - prompt
            of_prompts = (distance >= 0) & (distance < window)
        lengths = self.prompt_lengths[:, None, None]
        to_prompt = (prompt < lengths).expand(-1, len(answer), -1)
        to_own = (answer <= answer[:, None]).expand(len(lengths), -1, -1)
        if window is not None:
            to_prompt = to_prompt & (lengths + answer[:, None] - prompt < window)
            to_own = to_own & (answer[:, None] - answer < window)
        return of_prompts, torch.cat([to_prompt, to_own], dim=2)[:, None]


def _places(lengths: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (index in the row, position in the sequence, whether the token exists), each [sequences, longest], for sequences that
    lie end to end from index `first` on."""
    columns = torch.arange(int(lengths.max())).expand(len(lengths), -1)
    there = columns < lengths[:, None]
    places = columns + (lengths.cumsum(0) - lengths)[:, None] + first
    return torch.where(there, places, 0), columns, there


def _select(states: Tensor, places: Tensor) -> Tensor:
    """Select [1, heads, tokens, size] -> [sequences, heads, longest, size]."""
    chosen = states[0].index_select(1, places.flatten())
    return chosen.unflatten(1, tuple(places.shape)).transpose(0, 1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers. If the forward pass was called with `SharedPrompts`, they do it."""
    shared: Any = pop_spans(module, attention_mask, more)
    if shared is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    refuse_unknown(module, more)
    return shared.attend(module, query, key, value, scaling, window_of(module, more)), None


def share_prompts(model: PreTrainedModel, forward: Forward, device: torch.device) -> float | None:
    """Let `model` take rows with shared prompts, and check it. Return the largest difference between the logits of such a row and
    those of each answer alone, relative to the largest logit and to the tolerance for rounding: up to 1 is correct. Return None,
    and change nothing, if the model's attention cannot be replaced.

    forward: the model in evaluation mode. At ZeRO-3 every rank must call this.
    """
    if model.config._attn_implementation != "sdpa" or model.config.is_encoder_decoder or attention_problem(model):
        return None
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.dstune_replaced_attention = implementations_of(model.config)
    model.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    try:
        return _difference(forward, config.vocab_size, getattr(config, "sliding_window", None), device)
    except (UserError, TypeError, ValueError, RuntimeError):  # `refuse_unknown`, or the model's own code
        return float("inf")


def stop_sharing(model: PreTrainedModel) -> None:
    """Undo `share_prompts`."""
    replaced: Any = model.dstune_replaced_attention
    model.set_attn_implementation(replaced)


def _difference(forward: Forward, vocabulary: int, window: int | None, device: torch.device) -> float:
    longest = window + 9 if window and window + 9 <= LONGEST_PROOF else 11
    prompts, sizes, answers = (5, longest), (2, 1), (4, 1, 7)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(vocabulary, (sum(prompts) + sum(answers),), generator=generator).to(device)
    parts = row.split([*prompts, *answers])
    shared = SharedPrompts.build(prompts, sizes, answers, device)
    with torch.no_grad():
        together = forward(**shared.model_inputs(row[None]), use_cache=False).logits[0].split([*prompts, *answers])
        worst, largest = 0.0, 0.0
        for answer, prompt in enumerate((0, 0, 1)):
            tokens = torch.cat([parts[prompt], parts[2 + answer]])
            alone = forward(input_ids=tokens[None], use_cache=False).logits[0]
            difference = torch.cat([together[prompt], together[2 + answer]]) - alone
            largest = max(largest, float(alone.abs().max()))
            worst = max(worst, float(difference.abs().max()), key=lambda value: (value != value, value))
    return worst / largest / TOLERANCE[alone.dtype]
