"""The architectures that are written as GGUF: llama.cpp's name for each, its metadata, and how llama.cpp arranges its tensors.

Everything here was compared with llama.cpp's logits (`tests/unit/test_gguf_llama_cpp.py`). llama.cpp fixes some values in its code
(which layers attend in a window, how scores are scaled); a model with other values is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstune.checkpoint import gguf_linear_attention
from dstune.core.errors import Problem, UserError

if TYPE_CHECKING:
    import numpy as np

Describe = Callable[[Any, Any], None]
"""Adds metadata to a writer of the `gguf` package: (writer, configuration)."""
Limits = Callable[[Any], Iterator[str]]
"""Yields what llama.cpp would compute differently from a model with this configuration."""

OF_TEXT = ("model.layers.", "model.embed_tokens.", "model.norm.", "model.embedding_norm.", "lm_head.")
"""Beginnings of the names of a language model's tensors."""
EXPERT = re.compile(r"(?<=experts\.)(\d+)\.")
CONVOLUTION = (".conv.conv.weight", ".conv1d.weight")
"""Ends of the names of convolutions, which are f32 in every file: their rows are shorter than a block."""
GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
"""Numbers of layers at which llama.cpp scales scores as Gemma's models of 27 billion parameters do."""


def _nothing(writer: Any, config: Any) -> None:
    """Add nothing."""


def _no_limits(config: Any) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True)
class Family:
    """How a model type of transformers is written."""

    architecture: str
    """llama.cpp's name."""
    interleaves_rope: bool = False
    """Whether rows of query and key projections are in the order of Meta's rotary embedding."""
    adds_one_to_norms: bool = False
    has_windows: bool = False
    """Whether llama.cpp applies `sliding_window`."""
    rotates_part: bool = False
    """Whether `partial_rotary_factor` may be below 1."""
    has_own_yarn: bool = False
    """Whether `describe` and `limits` cover the further parameters of YaRN."""
    describe: Describe = _nothing
    limits: Limits = _no_limits

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


# -- metadata ---------------------------------------------------------------------------------------------------------


def _describe_window(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _describe_gemma2(writer: Any, config: Any) -> None:
    _describe_window(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _describe_olmo2(writer: Any, config: Any) -> None:
    if getattr(config, "sliding_window", None):
        _describe_window(writer, config)


def _describe_granite(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _describe_ministral3(writer: Any, config: Any) -> None:
    writer.add_rope_scaling_yarn_log_mul(rope(config)["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope(config)["llama_4_scaling_beta"])


def _describe_lfm2(writer: Any, config: Any) -> None:
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _describe_experts(writer: Any, config: Any) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


# -- limits -----------------------------------------------------------------------------------------------------------


def _window_limits(every: int) -> Limits:
    """Return the limits of models in which llama.cpp lets every `every`th layer attend to everything, the others in a window."""

    def limits(config: Any) -> Iterator[str]:
        expected = [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
            for layer in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != expected:
            yield f"llama.cpp lets every {every}th layer of this architecture attend to everything, this model others"

    return limits


def _gemma_limits(every: int) -> Limits:
    window_limits = _window_limits(every)

    def limits(config: Any) -> Iterator[str]:
        yield from window_limits(config)
        is_27b = config.num_hidden_layers == GEMMA_27B[config.model_type]
        squared = config.hidden_size / config.num_attention_heads if is_27b else head_size(config)
        if not math.isclose(config.query_pre_attn_scalar, squared):
            yield f"llama.cpp divides scores by the root of {squared:g}, this model of {config.query_pre_attn_scalar:g}"

    return limits


def _gemma2_limits(config: Any) -> Iterator[str]:
    yield from _gemma_limits(2)(config)
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        yield "llama.cpp caps scores and logits of this architecture, this model does not"


def _gemma3_limits(config: Any) -> Iterator[str]:
    yield from _gemma_limits(6)(config)
    local_base = config.rope_parameters["sliding_attention"]["rope_theta"]
    if local_base != 10_000:
        yield f"llama.cpp turns positions in windows with the base 10,000, this model with {local_base:g}"
    if getattr(config, "use_bidirectional_attention", None):
        yield "its tokens attend in both directions"


def _smollm3_limits(config: Any) -> Iterator[str]:
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != expected:
        yield "llama.cpp leaves positions out of every 4th layer, this model out of others"


def _olmo3_limits(config: Any) -> Iterator[str]:
    yield from _window_limits(4)(config)
    local, everywhere = config.rope_parameters["sliding_attention"], rope(config)
    if local["rope_type"] != "default" or local["rope_theta"] != everywhere["rope_theta"]:
        yield "llama.cpp turns positions in windows without scaling and with the base of the other layers"


def _ministral3_limits(config: Any) -> Iterator[str]:
    scales = rope(config).get("mscale"), rope(config).get("mscale_all_dim")
    if rope(config).get("rope_type") != "yarn" or scales != (1.0, 1.0) or "llama_4_scaling_beta" not in rope(config):
        yield "llama.cpp turns positions of this architecture by yarn with mscale=1, mscale_all_dim=1 and llama_4_scaling_beta"


def _qwen3_moe_limits(config: Any) -> Iterator[str]:
    if not config.norm_topk_prob:
        yield "llama.cpp normalizes the weights of the chosen experts, this model does not"
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        yield "llama.cpp has experts in every layer of this architecture, this model does not"


FAMILIES = {
    "llama": Family("llama", interleaves_rope=True),
    "mistral": Family("llama", interleaves_rope=True),
    "ministral3": Family(
        "mistral3",
        interleaves_rope=True,
        has_own_yarn=True,
        describe=_describe_ministral3,
        limits=_ministral3_limits,
    ),
    "mixtral": Family("llama", interleaves_rope=True, describe=_describe_experts),
    "qwen2": Family("qwen2"),
    "qwen2_5_vl_text": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3_vl_text": Family(
        "qwen3"
    ),  # the three positions of a text token are the same, so its rotary embedding is Qwen 3's
    "qwen3_moe": Family("qwen3moe", describe=_describe_experts, limits=_qwen3_moe_limits),
    "qwen3_5_text": Family(
        "qwen35",
        adds_one_to_norms=True,
        rotates_part=True,
        describe=gguf_linear_attention.describe,
        limits=gguf_linear_attention.limits,
    ),
    "gemma2": Family(
        "gemma2", adds_one_to_norms=True, has_windows=True, describe=_describe_gemma2, limits=_gemma2_limits
    ),
    "gemma3_text": Family(
        "gemma3", adds_one_to_norms=True, has_windows=True, describe=_describe_window, limits=_gemma3_limits
    ),
    "smollm3": Family("smollm3", interleaves_rope=True, limits=_smollm3_limits),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo2", has_windows=True, describe=_describe_olmo2, limits=_olmo3_limits),
    "granite": Family("granite", interleaves_rope=True, describe=_describe_granite),
    "phi3": Family("phi3", rotates_part=True),
    "glm4": Family("glm4", rotates_part=True),
    "lfm2": Family("lfm2", describe=_describe_lfm2),
    "seed_oss": Family("seed_oss"),
}
"""By model type of transformers, of the text part of models that take images."""


# -- all families -----------------------------------------------------------------------------------------------------


def check_architecture(config: Any) -> None:
    """Raise UserError if a model with this configuration, or its text part, cannot be written as GGUF."""
    config = config.get_text_config()
    name = config.model_type
    if name not in FAMILIES:
        written = ", ".join(family.removesuffix("_text") for family in FAMILIES)
        fix = f"GGUF is written for {written}; others export without --gguf"
        raise UserError(Problem("--gguf", "this architecture is not written as GGUF", fix, name))
    problems = [*_rope_limits(config), *FAMILIES[name].limits(config)]
    fix = "export without --gguf"
    if problems:
        raise UserError(Problem("--gguf", reason, fix, name) for reason in problems)


def _rope_limits(config: Any) -> Iterator[str]:
    kind = rope(config).get("rope_type", "default")
    allowed = ("default", "llama3", "linear", "yarn", *(("longrope",) if config.model_type == "phi3" else ()))
    if kind not in allowed:
        yield f"rotary embeddings of the type {kind} are not written as GGUF"
    elif (
        kind == "yarn"
        and not FAMILIES[config.model_type].has_own_yarn
        and any(rope(config).get(key) for key in ("mscale", "mscale_all_dim", "attention_factor"))
    ):
        yield "rotary embeddings of the type yarn with their own scale (mscale, attention_factor) are not written as GGUF"
    if not FAMILIES[config.model_type].rotates_part and rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        yield "rotary embeddings of a part of each head are not written as GGUF"


def text_name(tensor: str) -> str | None:
    """Return the name that a tensor of a model with images has in its language model alone; None if it belongs to another part."""
    if "language_model." in tensor:
        bare = tensor.replace("language_model.", "").removeprefix("model.")
        tensor = bare if bare.startswith("lm_head.") else f"model.{bare}"
    return tensor if tensor.startswith(OF_TEXT) else None


def rope(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotary embedding; if layers with windows have their own, those of the other layers."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    return parameters.get("full_attention", parameters) if FAMILIES[config.model_type].has_windows else parameters


def head_size(config: Any) -> int:
    """Return the length of a head of queries and keys."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: Any) -> int:
    """Return the number of tokens up to which llama.cpp computes what the model does: it ignores windows of some families."""
    window = getattr(config, "sliding_window", None)
    if FAMILIES[config.model_type].has_windows or not window:
        return int(config.max_position_embeddings)
    if not getattr(config, "use_sliding_window", True):
        return int(config.max_position_embeddings)
    return int(min(window, config.max_position_embeddings))


def add_sizes(writer: Any, config: Any) -> None:
    """Add the metadata of the architecture to a writer of the `gguf` package."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_feed_forward_length(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_key_value_heads(config))
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", None) or config.norm_eps)
    writer.add_rope_freq_base(rope(config).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(int(head_size(config) * rope(config).get("partial_rotary_factor", 1.0)))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    _add_rope_scaling(writer, config)
    FAMILIES[config.model_type].describe(writer, config)


def _feed_forward_length(config: Any) -> int:
    """Return the inner width of a feed-forward layer, which LFM 2 computes from the one in its configuration."""
    width = int(config.intermediate_size)
    if getattr(config, "block_auto_adjust_ff_dim", False):
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return width


def _key_value_heads(config: Any) -> int | list[int]:
    """Return the number of heads of keys and values; by layer, if some layers have convolutions instead."""
    layers, heads = getattr(config, "layer_types", None) or (), int(config.num_key_value_heads)
    return [0 if layer == "conv" else heads for layer in layers] if "conv" in layers else heads


def _add_rope_scaling(writer: Any, config: Any) -> None:
    import gguf

    parameters, original = rope(config), _original_positions(config)
    match parameters.get("rope_type", "default"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(parameters["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(parameters["factor"])
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_yarn_beta_fast(parameters.get("beta_fast") or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(parameters.get("beta_slow") or 1.0)
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(original)
            stretched = config.max_position_embeddings / original
            factor = parameters.get("attention_factor")
            if factor is None:  # as transformers computes it
                factor = 1.0 if stretched <= 1 else math.sqrt(1 + math.log(stretched) / math.log(original))
            writer.add_rope_scaling_attn_factors(factor)


def _original_positions(config: Any) -> int:
    original = rope(config).get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return int(original or config.max_position_embeddings)


def rope_tensors(config: Any) -> dict[str, np.ndarray]:
    """Return the tensors by which llama.cpp divides the frequencies of the rotary embedding, float32 [rotated / 2], by name."""
    import numpy as np

    parameters = rope(config)
    if parameters.get("rope_type") == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(parameters[f"{name}_factor"], dtype=np.float32)
            for name in ("long", "short")
        }
    if parameters.get("rope_type") != "llama3":
        return {}
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
    return {"rope_freqs.weight": (parameters["rope_theta"] ** -exponents / scaled).numpy()}
