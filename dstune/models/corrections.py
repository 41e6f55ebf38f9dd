"""Corrects errors in transformers' model classes: some end every forward pass, one lets a row depend on the rows before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


def correct_classes(architecture: PretrainedConfig) -> None:
    """Correct the classes that a model of `architecture` uses, in this process."""
    if correction := CORRECTIONS.get(architecture.model_type):
        correction()


def _correct_llama4() -> None:
    """Give the output of Llama 4's text model the `image_outputs` that its whole model reads (transformers 5.24)."""
    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None


CORRECTIONS: Mapping[str, Callable[[], None]] = {"llama4": _correct_llama4}
"""By model type."""


def forget_longest_row(model: nn.Module) -> None:
    """Let the frequencies of dynamic rotary embeddings depend on the row in the model alone.

    transformers (5.24) keeps those of the longest row so far for every later row that is longer than the original positions. So a
    loss would depend on the order of the rows, the number of ranks, and where a run was continued.
    """

    def forget(module: Any, _: Any) -> None:
        if module.max_seq_len_cached > module.original_max_seq_len:
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
            module.max_seq_len_cached = module.original_max_seq_len

    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and hasattr(module, "max_seq_len_cached"):
            module.register_forward_pre_hook(forget)
