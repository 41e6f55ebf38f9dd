"""The metadata of GGUF files, by the name of the writer's method in the `gguf` package (`add_...`), and their rotary factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

OWN_ROPE_IN_WINDOWS = ("gemma3_text", "gemma4_text", "olmo3")
"""Model types whose layers with windows have parameters of the rotary embedding of their own."""


def common_metadata(config: Any) -> dict[str, Any]:
    """Return what every architecture has."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": getattr(config, "rms_norm_eps", None) or config.norm_eps,
        "rope_freq_base": rope(config).get("rope_theta", 10000.0),
        "rope_dimension_count": int(head_size(config) * rope(config).get("partial_rotary_factor", 1.0)),
        "key_length": head_size(config),
        "value_length": head_size(config),
        **_rope_scaling(config),
    }


def window(config: Any) -> dict[str, Any]:
    """Return the window of layers that do not attend to everything."""
    return {"sliding_window": config.sliding_window} if getattr(config, "sliding_window", None) else {}


def ignored_window(config: Any) -> dict[str, Any]:
    """Return the window as the number of tokens up to which llama.cpp, which ignores it, computes what the model does."""
    size = getattr(config, "sliding_window", None)
    if not size or not getattr(config, "use_sliding_window", True):
        return {}
    return {"context_length": min(size, config.max_position_embeddings)}


def gemma2(config: Any) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": config.attn_logit_softcapping}
    return window(config) | caps | {"final_logit_softcapping": config.final_logit_softcapping}


def granite(config: Any) -> dict[str, Any]:
    return {
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def ministral3(config: Any) -> dict[str, Any]:
    parameters = rope(config)
    scale = {"attn_temperature_scale": parameters["llama_4_scaling_beta"]}
    return scale | {"rope_scaling_yarn_log_mul": parameters["mscale_all_dim"]}


def lfm2(config: Any) -> dict[str, Any]:
    """Return the inner width, which LFM 2 computes from the one in its configuration, and which layers have heads of keys."""
    width = int(config.intermediate_size)
    if config.block_auto_adjust_ff_dim:
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    heads = [0 if layer == "conv" else config.num_key_value_heads for layer in config.layer_types]
    return {"feed_forward_length": width, "head_count_kv": heads, "shortconv_l_cache": config.conv_L_cache}


def experts(config: Any) -> dict[str, Any]:
    return {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}


def mixtral(config: Any) -> dict[str, Any]:
    return experts(config) | ignored_window(config)


def qwen3_moe(config: Any) -> dict[str, Any]:
    return experts(config) | {"expert_feed_forward_length": config.moe_intermediate_size}


# -- rotary embeddings ------------------------------------------------------------------------------------------------


def rope(config: Any) -> dict[str, Any]:
    """Return the parameters of the rotary embedding; if layers with windows have their own, those of the other layers."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    return parameters["full_attention"] if config.model_type in OWN_ROPE_IN_WINDOWS else parameters


def head_size(config: Any) -> int:
    """Return the length of a head of queries and keys."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_scaling(config: Any) -> dict[str, Any]:
    import gguf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, original = rope(config), _original_positions(config)
    match parameters.get("rope_type", "default"):
        case "linear":
            return {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": parameters["factor"]}
        case "yarn":
            return {
                "rope_scaling_type": gguf.RopeScalingType.YARN,
                "rope_scaling_factor": parameters["factor"],
                "rope_scaling_orig_ctx_len": original,
                "rope_scaling_yarn_beta_fast": parameters.get("beta_fast") or 32.0,
                "rope_scaling_yarn_beta_slow": parameters.get("beta_slow") or 1.0,
            }
        case "longrope":
            _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, device="cpu")
            return {"rope_scaling_orig_ctx_len": original, "rope_scaling_attn_factors": factor}
    return {}


def _original_positions(config: Any) -> int:
    original = rope(config).get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return int(original or config.max_position_embeddings)


def rope_factors(config: Any) -> dict[str, np.ndarray]:
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
