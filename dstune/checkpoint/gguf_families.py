"""The architectures that are written as GGUF: llama.cpp's name for each, its metadata, and how llama.cpp arranges its tensors.

Everything here was compared with llama.cpp's logits (`tests/unit/test_gguf_llama_cpp.py`). llama.cpp fixes some values in its code
(which layers attend in a window, how scores are scaled); a model with other values is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstune.checkpoint import gguf_gemma4, gguf_limits, gguf_linear_attention, gguf_metadata
from dstune.checkpoint.gguf_limits import Limits
from dstune.core.errors import Problem, UserError

if TYPE_CHECKING:
    import numpy as np

Metadata = Callable[[Any], dict[str, Any]]
"""Returns what an architecture has beside `common_metadata`, or in place of it, for a configuration."""

OF_OTHER_PARTS = re.compile(r"(^|\.)(vision_tower|visual|multi_modal_projector|embed_vision|embed_audio|audio_tower)\.")
"""Names of tensors of the parts for images and sound."""
WITH_OTHER_PARTS = ("gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl")
"""Model types of which the language model alone is written. Others name its tensors differently (SmolVLM)."""
EXPERT = re.compile(r"(?<=experts\.)(\d+)\.")
CONVOLUTION = (".conv.conv.weight", ".conv1d.weight")
"""Ends of the names of convolutions, which are f32 in every file: their rows are shorter than a block."""


def _nothing(config: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """How a model type of transformers is written."""

    architecture: str
    """llama.cpp's name."""
    interleaves_rope: bool = False
    """Whether rows of query and key projections are in the order of Meta's rotary embedding."""
    adds_one_to_norms: bool = False
    rotates_part: bool = False
    """Whether `partial_rotary_factor` may be below 1."""
    has_own_rope: bool = False
    """Whether `metadata` and `limits` cover the rotary embedding."""
    metadata: Metadata = _nothing
    limits: Limits = gguf_limits.no_limits
    rope_factors: Callable[[Any], dict[str, np.ndarray]] = gguf_metadata.rope_factors
    """Returns the tensors by which llama.cpp divides the frequencies of the rotary embedding, by name."""
    vocabulary: str = ""
    """llama.cpp's name for the vocabulary, if the architecture has its own."""

    def arranged(self, weight: np.ndarray, name: str, config: Any) -> np.ndarray:
        """Return `weight` as llama.cpp expects it. name: of the tensor in transformers."""
        if ".linear_attn." in name:
            return gguf_linear_attention.arranged(weight, name, config)
        if name.endswith(CONVOLUTION):  # [channels, 1, taps] without the axis of one input channel
            return weight[:, 0]
        if self.adds_one_to_norms and name.endswith("norm.weight"):
            return weight + 1
        if heads := self._interleaved_heads(name, config):
            # The two halves of a head's rows become neighbours: [heads, 2, half, ...] -> [heads, half, 2, ...].
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            return halves.swapaxes(1, 2).reshape(weight.shape)
        return weight

    def restored(self, weight: np.ndarray, name: str, config: Any) -> np.ndarray:
        """Return `weight` of a GGUF file as transformers expects it, the inverse of `arranged`."""
        if ".linear_attn." in name:
            return gguf_linear_attention.arranged(weight, name, config, backwards=True)
        if name.endswith(CONVOLUTION):
            return weight[:, None]
        if self.adds_one_to_norms and name.endswith("norm.weight"):
            return weight - 1
        if heads := self._interleaved_heads(name, config):
            pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
            return pairs.swapaxes(1, 2).reshape(weight.shape)
        return weight

    def _interleaved_heads(self, name: str, config: Any) -> int:
        """Return the number of heads in a projection whose rows are interleaved, 0 for other tensors."""
        if not self.interleaves_rope or not (match := re.search(r"\.([qk])_proj\.(weight|bias)$", name)):
            return 0
        return int(config.num_attention_heads if match[1] == "q" else config.num_key_value_heads)


FAMILIES = {
    "llama": Family("llama", interleaves_rope=True),
    "mistral": Family("llama", interleaves_rope=True, metadata=gguf_metadata.ignored_window),
    "ministral3": Family(
        "mistral3",
        interleaves_rope=True,
        has_own_rope=True,
        metadata=gguf_metadata.ministral3,
        limits=gguf_limits.ministral3_limits,
    ),
    "mixtral": Family("llama", interleaves_rope=True, metadata=gguf_metadata.mixtral),
    "qwen2": Family("qwen2", metadata=gguf_metadata.ignored_window),
    "qwen2_5_vl_text": Family("qwen2"),
    "qwen3": Family("qwen3", metadata=gguf_metadata.ignored_window),
    "qwen3_vl_text": Family(
        "qwen3"
    ),  # the three positions of a text token are the same, so its rotary embedding is Qwen 3's
    "qwen3_moe": Family("qwen3moe", metadata=gguf_metadata.qwen3_moe, limits=gguf_limits.qwen3_moe_limits),
    "qwen3_5_text": Family(
        "qwen35",
        adds_one_to_norms=True,
        rotates_part=True,
        metadata=gguf_linear_attention.metadata,
        limits=gguf_linear_attention.limits,
    ),
    "gemma2": Family("gemma2", adds_one_to_norms=True, metadata=gguf_metadata.gemma2, limits=gguf_limits.gemma2_limits),
    "gemma3_text": Family(
        "gemma3", adds_one_to_norms=True, metadata=gguf_metadata.window, limits=gguf_limits.gemma3_limits
    ),
    "gemma4_text": Family(
        "gemma4",
        has_own_rope=True,
        metadata=gguf_gemma4.metadata,
        limits=gguf_gemma4.limits,
        rope_factors=gguf_gemma4.rope_factors,
        vocabulary="gemma4",
    ),
    "smollm3": Family("smollm3", interleaves_rope=True, limits=gguf_limits.smollm3_limits),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2", metadata=gguf_metadata.window, limits=gguf_limits.olmo3_limits),
    "granite": Family("granite", interleaves_rope=True, metadata=gguf_metadata.granite),
    "phi3": Family("phi3", rotates_part=True, metadata=gguf_metadata.ignored_window),
    "glm4": Family("glm4", rotates_part=True),
    "lfm2": Family("lfm2", metadata=gguf_metadata.lfm2),
    "seed_oss": Family("seed_oss"),
}
"""By model type of transformers, of the text part of models that take images."""


def check_architecture(config: Any) -> None:
    """Raise UserError if a model with this configuration, or its text part, cannot be written as GGUF."""
    whole, config = config, config.get_text_config()
    name = config.model_type
    is_part = config is not whole
    if name not in FAMILIES or (is_part and whole.model_type not in WITH_OTHER_PARTS):
        written = ", ".join(family.removesuffix("_text") for family in FAMILIES)
        fix = f"GGUF is written for {written}; others export without --gguf"
        raise UserError(Problem("--gguf", "this architecture is not written as GGUF", fix, whole.model_type))
    family = FAMILIES[name]
    of_rope = () if family.has_own_rope else gguf_limits.rope_limits(config, rotates_part=family.rotates_part)
    problems = [*of_rope, *family.limits(config)]
    fix = "export without --gguf"
    if problems:
        raise UserError(Problem("--gguf", reason, fix, name) for reason in problems)


def text_name(tensor: str) -> str | None:
    """Return the name that a tensor of a model with images has in its language model alone; None if it belongs to another part."""
    if "language_model." in tensor:
        bare = tensor.replace("language_model.", "").removeprefix("model.")
        return bare if bare.startswith("lm_head.") else f"model.{bare}"
    return None if OF_OTHER_PARTS.search(tensor) else tensor


def metadata_of(config: Any) -> dict[str, Any]:
    """Return the metadata of a model, by the name of the writer's method without `add_`."""
    layers = getattr(config, "per_layer_config", None)  # settings that differ between layers can be read there only
    common = gguf_metadata.common_metadata(layers[0] if layers is not None else config)
    return common | FAMILIES[config.model_type].metadata(config)
