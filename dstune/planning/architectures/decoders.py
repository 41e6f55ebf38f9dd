"""Decoders: Llama and its kin."""

from __future__ import annotations

from typing import Any

from dstune.planning.architectures.tensors import CLASSIFIER, LANGUAGE_MODEL, TOKEN_CLASSIFIER, Architecture, Collector

_LLAMA = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "head_dim": None}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {"tie_word_embeddings": False, "head_dim": None, "num_key_value_heads": 8},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"attention_bias": False, "tie_word_embeddings": False, "head_dim": 128},
    "gemma": {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 256},
    "gemma2": {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 256},
    "gemma3_text": {
        "attention_bias": False,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "smollm3": {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "head_dim": None},
    "mixtral": {
        "tie_word_embeddings": False,
        "head_dim": None,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "attention_bias": False,
        "tie_word_embeddings": False,
        "head_dim": None,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
}
"""What transformers assumes where config.json leaves a value out."""

QUERY_NORM = ("qwen3", "qwen3_moe", "gemma3_text")
FOUR_NORMS = ("gemma2", "gemma3_text")
"""Kinds of decoders that normalise queries and keys, and those that normalise what a block adds as well."""


def decoder(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """Describe Llama and its kin: Mistral, Qwen 2 and 3, Gemma 1 to 3, SmolLM3; Mixtral and Qwen 3 with experts."""
    kind, layers, hidden = c["model_type"], c["num_hidden_layers"], c["hidden_size"]
    heads, kv_heads, head_dim = _heads(c)
    routed = _routed_layers(c)
    experts = c["num_experts_per_tok"] if routed else 0
    add = Collector()
    add.table("model.embed_tokens", c["vocab_size"], hidden)
    for index in range(layers):
        _decoder_layer(add, c, index, experts=experts if index in routed else 0)
    add.norm("model.norm", hidden)
    if head == LANGUAGE_MODEL and not c["tie_word_embeddings"]:
        add.linear("lm_head", hidden, c["vocab_size"])
    if head in (CLASSIFIER, TOKEN_CLASSIFIER):
        add.linear("score", hidden, labels, bias=head == TOKEN_CLASSIFIER)
    windowed = {"mistral": layers, "mixtral": layers, "gemma2": layers // 2, "gemma3_text": layers - layers // 6}
    window = c.get("sliding_window") if kind in windowed else None
    return Architecture(
        kind=kind,
        tensors=tuple(add.found),
        layers=layers,
        hidden=hidden,
        intermediate=experts * _expert_inner(c) if routed else c["intermediate_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=c["vocab_size"],
        gated=True,
        tied=bool(c["tie_word_embeddings"]),
        experts=experts,
        norms=4 if kind in FOUR_NORMS else 2,
        query_norm=kind in QUERY_NORM,
        window=window,
        windowed_layers=windowed[kind] if window else 0,
        soft_capped=kind == "gemma2",
    )


def _heads(c: dict[str, Any]) -> tuple[int, int, int]:
    """Return heads of queries, of keys and values, and the width of one."""
    heads = c["num_attention_heads"]
    return heads, c.get("num_key_value_heads") or heads, c.get("head_dim") or c["hidden_size"] // heads


def _decoder_layer(add: Collector, c: dict[str, Any], index: int, *, experts: int) -> None:
    """Add a layer. experts: that a token is sent to; 0 where the layer has one feed-forward part."""
    kind, hidden, inner = c["model_type"], c["hidden_size"], c["intermediate_size"]
    heads, kv_heads, head_dim = _heads(c)
    at, output_bias, mlp_bias = f"model.layers.{index}", bool(c.get("attention_bias")), bool(c.get("mlp_bias"))
    bias = output_bias or kind == "qwen2"
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        add.linear(f"{at}.self_attn.{name}_proj", hidden, count * head_dim, bias=bias, layer=index)
    add.linear(f"{at}.self_attn.o_proj", heads * head_dim, hidden, bias=output_bias, layer=index)
    for name in ("q_norm", "k_norm") if kind in QUERY_NORM else ():
        add.norm(f"{at}.self_attn.{name}", head_dim, layer=index)
    if experts:
        add.experts(f"{at}.mlp", _experts(c), experts, _expert_inner(c), hidden, layer=index)
    else:
        add.linear(f"{at}.mlp.gate_proj", hidden, inner, bias=mlp_bias, layer=index)
        add.linear(f"{at}.mlp.up_proj", hidden, inner, bias=mlp_bias, layer=index)
        add.linear(f"{at}.mlp.down_proj", inner, hidden, bias=mlp_bias, layer=index)
    norms = ("input_layernorm", "post_attention_layernorm")
    for name in (*norms, "pre_feedforward_layernorm", "post_feedforward_layernorm") if kind in FOUR_NORMS else norms:
        add.norm(f"{at}.{name}", hidden, layer=index)


def _routed_layers(c: dict[str, Any]) -> range | list[int]:
    """Return the layers whose feed-forward part is made of experts (of Qwen 3 every `decoder_sparse_step`th may be)."""
    layers = range(c["num_hidden_layers"])
    match c["model_type"]:
        case "mixtral":
            return layers
        case "qwen3_moe":
            dense = c["mlp_only_layers"] or ()
            return [n for n in layers if n not in dense and _experts(c) and (n + 1) % c["decoder_sparse_step"] == 0]
    return []


def _experts(c: dict[str, Any]) -> int:
    # transformers 5 saves Qwen's number under Mixtral's name.
    return int(c.get("num_local_experts") or c["num_experts"])


def _expert_inner(c: dict[str, Any]) -> int:
    return int(c["intermediate_size"] if c["model_type"] == "mixtral" else c["moe_intermediate_size"])
