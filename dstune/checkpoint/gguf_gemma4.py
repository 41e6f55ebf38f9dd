"""Gemma 4 as llama.cpp stores it: layers with full attention have longer heads, and the last layers reuse keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

FULL, WINDOW = "full_attention", "sliding_attention"
UNROTATED = 1e30
"""Divisor of the frequencies of dimensions that are not rotated: llama.cpp has one rotary embedding for the whole head."""


def metadata(config: Any) -> dict[str, Any]:
    """Return the sizes that differ between layers, and the embeddings of each layer."""
    in_full, in_window = _head_size(config, FULL), _head_size(config, WINDOW)
    first_shared = config.num_hidden_layers - config.num_kv_shared_layers
    factors = [
        2 if config.use_double_wide_mlp and layer >= first_shared else 1 for layer in range(config.num_hidden_layers)
    ]
    own_rope = config.rope_parameters["sliding_attention"]
    values = {
        "feed_forward_length": [config.intermediate_size * factor for factor in factors],
        "head_count_kv": _by_layer(config, "num_key_value_heads"),
        "key_length": in_full,
        "value_length": in_full,
        "key_length_swa": in_window,
        "value_length_swa": in_window,
        "rope_dimension_count": in_full,
        "rope_dimension_count_swa": in_window,
        "rope_freq_base_swa": own_rope["rope_theta"],
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": [kind == WINDOW for kind in config.layer_types],
        "shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
    }
    if config.final_logit_softcapping:
        values["final_logit_softcapping"] = config.final_logit_softcapping
    return values


def limits(config: Any) -> Iterator[str]:
    """Yield what llama.cpp would compute differently, or what is not written."""
    if config.enable_moe_block:
        yield "mixtures of experts of Gemma 4 are not written as GGUF"
    sizes, heads = _by_layer(config, "head_dim"), _by_layer(config, "num_attention_heads")
    if len(set(zip(sizes, config.layer_types, strict=True))) > len(set(config.layer_types)) or len(set(heads)) > 1:
        yield "llama.cpp has heads of one size in layers with windows and of one size in the others, this model does not"
    whole, own = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    if whole.get("rope_type") not in ("default", "proportional") or own.get("rope_type") != "default":
        yield "llama.cpp scales no positions of this architecture, this model does"
    if config.use_bidirectional_attention not in (None, "vision"):
        yield "its tokens attend in both directions"


def rope_factors(config: Any) -> dict[str, np.ndarray]:
    """Return the divisors of the frequencies in layers with full attention, float32 [head size / 2]: some do not rotate all of a
    head."""
    import numpy as np

    size = _head_size(config, FULL)
    rotated = int(size * config.rope_parameters["full_attention"].get("partial_rotary_factor", 1.0) / 2)
    factors = [1.0] * rotated + [UNROTATED] * (size // 2 - rotated)
    return {"rope_freqs.weight": np.array(factors, dtype=np.float32)}


def _head_size(config: Any, kind: str) -> int:
    """Return the length of a head in the layers of a kind; of the other kind, if there are none."""
    sizes = _by_layer(config, "head_dim")
    return next((size for size, layer in zip(sizes, config.layer_types, strict=True) if layer == kind), sizes[0])


def _by_layer(config: Any, name: str) -> list[int]:
    """Return the value of a setting in each layer."""
    return [int(getattr(config.per_layer_config[layer], name)) for layer in range(config.num_hidden_layers)]
