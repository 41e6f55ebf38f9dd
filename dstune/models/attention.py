"""Computes attention for each sample separately: packed rows need no mask of all pairs of positions, and padding is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dstune.config.schema import Attention, RunConfig
from dstune.models.cpu_attention import CausalAttention, computes
from dstune.models.spans import (
    Spans,
    attention_problem,
    pop_spans,
    refuse_unknown,
    spans_of,
    window_of,
    with_spans,
)
from dstune.protocols import method_of, task_of
from dstune.zero import accelerator


def implementations_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return the names of the attention of a model and of those in it, by their keys, as `set_attn_implementation` takes them.

    They may differ: the encoder of sound in VibeVoice has none that another one could replace.
    """
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {"": config._attn_implementation} | {
        key: implementations_of(part) for key, part in parts.items() if isinstance(part, PretrainedConfig)
    }


class SpanAttention:
    """Attention function of a model that computes samples one by one if the forward pass gets their spans."""

    NAME: ClassVar[str]
    """Name of the function in transformers' registry."""
    title: str
    """Name in `environment.json` and `dstune doctor`."""
    whole: bool = True
    """Whether a rank has all positions of its rows."""

    def boundaries(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int] | None:
        """Return the boundaries of samples as tensors if this attention uses them; None otherwise."""
        return None

    def install(self, model: PreTrainedModel) -> None:
        """Let `model` use this attention."""
        AttentionInterface.register(self.NAME, self._attention)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)  # for forward passes without spans, as in generation
        self._model, self._original = model, model.config._attn_implementation
        self._originals = implementations_of(model.config)
        model.set_attn_implementation(self.NAME)

    def uninstall(self) -> None:
        """Give the model back the attention that it was loaded with."""
        self._model.set_attn_implementation(self._originals)

    @contextmanager
    def original_attention(self) -> Iterator[None]:
        """Give the model back the attention that it was loaded with, within the block."""
        self.uninstall()
        yield
        self._model.set_attn_implementation(self.NAME)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Any,
        *,
        dropout: float,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Compute attention; see `attend`. spans: start and end of each sample in each row."""
        return attend(query, key, value, spans, dropout=dropout, scale=scale, window=window)

    def redistribute_inputs(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return query, key and value, [rows, heads, positions, size], for the heads and positions that this rank computes."""
        return states

    def redistribute_outputs(self, attended: torch.Tensor) -> torch.Tensor:
        """Return the output of attention, [rows, heads, positions, size], for the positions that the layer continues with."""
        return attended

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Compute attention for transformers: [rows, positions, heads, size]. query: [rows, heads, positions, size]; key and
        value may have fewer heads."""
        spans = pop_spans(module, attention_mask, options)
        if spans is None:  # rows without spans
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
        refuse_unknown(module, options)
        query, key, value = self.redistribute_inputs(query, key, value)
        dropout = dropout if module.training else 0.0
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = self.attend(
            query, key, value, spans, dropout=dropout, scale=scale, window=window_of(module, options)
        )
        return self.redistribute_outputs(attended).transpose(1, 2), None


class SamplesApart(SpanAttention):
    """Attention that computes samples one by one. The head of the language model passes it their spans."""

    NAME = "dstune_samples"
    title = "samples one by one"

    @classmethod
    def of(cls, config: RunConfig, model: PreTrainedModel) -> SamplesApart | None:
        """Install it if `model.attention=auto` should compute samples one by one: on a CPU, for models and methods that support it.
        Otherwise return None.

        GPUs have kernels for packed rows (`models.packed_attention`); here they would wait for one kernel launch after another.
        """
        is_auto_on_cpu = config.model.attention is Attention.auto and not accelerator.present()
        language = task_of(config.task).language
        is_supported = not (
            method_of(config.method).in_front or model.config.is_encoder_decoder or attention_problem(model)
        )
        # With dropout, torch's attention keeps all probabilities, so computing samples one by one would save nothing.
        dropout = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
        if not (is_auto_on_cpu and language and is_supported) or dropout:
            return None
        return cls(model)

    def __init__(self, model: PreTrainedModel):
        self.install(model)

    def model_inputs(
        self, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, boundaries: Any = None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the model's inputs and the labels. See `spans_of`; this attention ignores boundaries."""
        return with_spans(inputs, labels, spans_of(inputs)), labels

    def refuse(self, reason: str) -> str:
        """Give the model back the attention that it was loaded with; return the message about it."""
        self.uninstall()
        return (
            f"model.attention=auto: {self._original}, since samples that attend one by one have other logits ({reason})"
        )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    *,
    dropout: float,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Compute causal attention within each sample separately, [rows, heads, positions, size]; zeros after the last sample.

    window: how many positions each one sees, including itself. A longer sample is computed in pieces of `window` positions, each
    of which sees fewer than `window` earlier ones, so that a mask has at most 2 x window^2 elements.
    """
    if not dropout and computes(query, value):
        return CausalAttention.apply(query, key, value, spans, scale, window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))

    def piece(rows: slice, first: int, end: int, start: int) -> torch.Tensor:
        """Compute attention for positions `first` to `end` of a sample that begins at `start`."""
        first_key = start if window is None else max(start, first - window + 1)
        q, k, v = query[rows, :, first:end], key[rows, :, first_key:end], value[rows, :, first_key:end]
        mask = None
        if window is not None and first_key < first:
            distance = torch.arange(first, end, device=q.device)[:, None] - torch.arange(
                first_key, end, device=q.device
            )
            mask = (distance >= 0) & (distance < window)
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
        )

    def whole(rows: slice, of_row: tuple[tuple[int, int], ...]) -> torch.Tensor:
        outputs = []
        for start, end in of_row:
            step = window or end - start
            outputs += [piece(rows, first, min(first + step, end), start) for first in range(start, end, step)]
        return functional.pad(torch.cat(outputs, dim=2), (0, 0, 0, query.shape[2] - of_row[-1][1]))

    if len(set(spans)) == 1:
        return whole(slice(None), spans[0])
    return torch.cat([whole(slice(row, row + 1), of_row) for row, of_row in enumerate(spans)], dim=0)
