"""Corrects errors in transformers' model classes that end every forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
