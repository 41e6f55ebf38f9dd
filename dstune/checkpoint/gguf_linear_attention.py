"""Linear attention (gated delta net) of Qwen 3.5 as llama.cpp stores it.

transformers has the heads of values in groups, each group for one head of keys; llama.cpp repeats the heads of keys in turn, so the
heads of values are in another order: [key heads, values of each] becomes [values of each, key heads].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def metadata(config: Any) -> dict[str, Any]:
    """Return the sizes of linear attention, and which part of a head each of the three positions turns."""
    sections = list((config.rope_parameters or {}).get("mrope_section") or ())
    return {
        "ssm_conv_kernel": config.linear_conv_kernel_dim,
        "ssm_state_size": config.linear_key_head_dim,
        "ssm_group_count": config.linear_num_key_heads,
        "ssm_time_step_rank": config.linear_num_value_heads,
        "ssm_inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "full_attention_interval": _interval(config),
        "rope_dimension_sections": (sections + [0] * 4)[:4],
    }


def limits(config: Any) -> Iterator[str]:
    """Yield what llama.cpp would compute differently."""
    interval = _interval(config)
    expected = [
        "full_attention" if (layer + 1) % interval == 0 else "linear_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != expected:
        yield f"llama.cpp has full attention in every {interval}th layer of this architecture, this model in others"
    if config.linear_key_head_dim != config.linear_value_head_dim:
        yield "llama.cpp has heads of keys and values of one size in linear attention, this model does not"


def _interval(config: Any) -> int:
    types = list(config.layer_types)
    return types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1


def arranged(weight: np.ndarray, name: str, config: Any, *, backwards: bool = False) -> np.ndarray:
    """Return a tensor of a linear attention as llama.cpp expects it; backwards: as transformers does."""
    import numpy as np

    keys, size = config.linear_num_key_heads, config.linear_value_head_dim
    of_each = config.linear_num_value_heads // keys
    grouping = (of_each, keys) if backwards else (keys, of_each)

    def swapped(part: np.ndarray, width: int) -> np.ndarray:
        return part.reshape(*grouping, width, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape)

    before_values = 2 * keys * config.linear_key_head_dim
    if name.endswith("conv1d.weight"):
        weight = weight[:, None] if backwards else weight[:, 0]  # without the axis of one input channel
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        return np.concatenate([weight[:before_values], swapped(weight[before_values:], size)])
    if name.endswith("in_proj_z.weight"):
        return swapped(weight, size)
    if name.endswith("out_proj.weight"):
        return np.ascontiguousarray(swapped(weight.T, size).T)
    if name.endswith((".in_proj_a.weight", ".in_proj_b.weight", ".dt_bias")):
        return swapped(weight, 1)
    if name.endswith(".A_log"):
        return np.log(-swapped(weight, 1)) if backwards else -np.exp(swapped(weight, 1))
    return weight
