"""Models of transformers whose forward pass over text fails, and works with what is missing put back."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

WITHOUT_IMAGES = ("Llama4ForConditionalGeneration",)
"""Classes that read `image_outputs` of what their language model returns, where a language model has none (transformers 5.24)."""


def repair_forward(model: PreTrainedModel) -> None:
    """Let the language model inside `model` return what the code around it reads."""
    if type(model).__name__ in WITHOUT_IMAGES:
        model.language_model.register_forward_hook(_add_image_outputs)


def _add_image_outputs(module: Any, inputs: Any, output: Any) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None
