"""What llama.cpp fixes in its code for an architecture, so that it would compute a model with other values differently."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from dstune.checkpoint.gguf_metadata import head_size, rope

Limits = Callable[[Any], Iterator[str]]
"""Yields what llama.cpp would compute differently from a model with this configuration."""

GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
"""Numbers of layers at which llama.cpp scales scores as Gemma's models of 27 billion parameters do."""


def no_limits(config: Any) -> Iterator[str]:
    """Yield nothing."""
    yield from ()


def window_limits(every: int) -> Limits:
    """Return the limits of models in which llama.cpp lets every `every`th layer attend to everything, the others in a window."""

    def limits(config: Any) -> Iterator[str]:
        expected = [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
            for layer in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != expected:
            yield f"llama.cpp lets every {every}th layer of this architecture attend to everything, this model others"

    return limits


def gemma_limits(every: int) -> Limits:
    of_windows = window_limits(every)

    def limits(config: Any) -> Iterator[str]:
        yield from of_windows(config)
        is_27b = config.num_hidden_layers == GEMMA_27B[config.model_type]
        squared = config.hidden_size / config.num_attention_heads if is_27b else head_size(config)
        if not math.isclose(config.query_pre_attn_scalar, squared):
            yield f"llama.cpp divides scores by the root of {squared:g}, this model of {config.query_pre_attn_scalar:g}"

    return limits


def gemma2_limits(config: Any) -> Iterator[str]:
    yield from gemma_limits(2)(config)
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        yield "llama.cpp caps scores and logits of this architecture, this model does not"


def gemma3_limits(config: Any) -> Iterator[str]:
    yield from gemma_limits(6)(config)
    local_base = config.rope_parameters["sliding_attention"]["rope_theta"]
    if local_base != 10_000:
        yield f"llama.cpp turns positions in windows with the base 10,000, this model with {local_base:g}"
    if getattr(config, "use_bidirectional_attention", None):
        yield "its tokens attend in both directions"


def smollm3_limits(config: Any) -> Iterator[str]:
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != expected:
        yield "llama.cpp leaves positions out of every 4th layer, this model out of others"


def olmo3_limits(config: Any) -> Iterator[str]:
    yield from window_limits(4)(config)
    local, everywhere = config.rope_parameters["sliding_attention"], rope(config)
    if local["rope_type"] != "default" or local["rope_theta"] != everywhere["rope_theta"]:
        yield "llama.cpp turns positions in windows without scaling and with the base of the other layers"


def ministral3_limits(config: Any) -> Iterator[str]:
    scales = rope(config).get("mscale"), rope(config).get("mscale_all_dim")
    if rope(config).get("rope_type") != "yarn" or scales != (1.0, 1.0) or "llama_4_scaling_beta" not in rope(config):
        yield "llama.cpp turns positions of this architecture by yarn with mscale=1, mscale_all_dim=1 and llama_4_scaling_beta"


def qwen3_moe_limits(config: Any) -> Iterator[str]:
    if not config.norm_topk_prob:
        yield "llama.cpp normalizes the weights of the chosen experts, this model does not"
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        yield "llama.cpp has experts in every layer of this architecture, this model does not"


def rope_limits(config: Any, *, rotates_part: bool) -> Iterator[str]:
    kind = rope(config).get("rope_type", "default")
    allowed = ("default", "llama3", "linear", "yarn", *(("longrope",) if config.model_type == "phi3" else ()))
    if kind not in allowed:
        yield f"rotary embeddings of the type {kind} are not written as GGUF"
    elif kind == "yarn" and rope(config).get("truncate") is False:
        yield "llama.cpp rounds the bounds of yarn to whole dimensions, this model does not (truncate)"
    elif kind == "yarn" and any(rope(config).get(key) for key in ("mscale", "mscale_all_dim", "attention_factor")):
        yield "rotary embeddings of the type yarn with their own scale (mscale, attention_factor) are not written as GGUF"
    if not rotates_part and rope(config).get("partial_rotary_factor", 1.0) != 1.0:
        yield "rotary embeddings of a part of each head are not written as GGUF"
