"""Encoders with decoders: T5 and BART."""

from __future__ import annotations

from typing import Any

from dstune.planning.architectures.tensors import LANGUAGE_MODEL, Architecture, Collector

DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32,
        "num_decoder_layers": None,
        "dropout_rate": 0.1,
    },
    "bart": {"max_position_embeddings": 1024, "tie_word_embeddings": True, "dropout": 0.1},
}
"""What transformers assumes where config.json leaves a value out."""


def t5(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """Describe T5 (Raffel et al. 2020, arXiv:1910.10683). Layers count encoder and decoder together."""
    hidden, inner, heads, width = c["d_model"], c["d_ff"], c["num_heads"], c["d_kv"]
    gated = str(c["feed_forward_proj"]).startswith("gated-")
    add = Collector()
    add.table("shared", c["vocab_size"], hidden)
    decoder_layers = c["num_decoder_layers"] or c["num_layers"]
    for stack, count in (("encoder", c["num_layers"]), ("decoder", decoder_layers)):
        for index in range(count):
            layer = index + (c["num_layers"] if stack == "decoder" else 0)
            at = f"{stack}.block.{index}.layer"
            kinds = ["SelfAttention", "EncDecAttention"] if stack == "decoder" else ["SelfAttention"]
            for number, attention in enumerate(kinds):
                for name in ("q", "k", "v"):
                    add.linear(f"{at}.{number}.{attention}.{name}", hidden, heads * width, layer=layer)
                add.linear(f"{at}.{number}.{attention}.o", heads * width, hidden, layer=layer)
                if index == number == 0:
                    table = f"{at}.0.SelfAttention.relative_attention_bias"
                    add.table(table, c["relative_attention_num_buckets"], heads, layer=layer)
                add.norm(f"{at}.{number}.layer_norm", hidden, layer=layer)
            feed = f"{at}.{len(kinds)}"
            for name in ("wi_0", "wi_1") if gated else ("wi",):
                add.linear(f"{feed}.DenseReluDense.{name}", hidden, inner, layer=layer)
            add.linear(f"{feed}.DenseReluDense.wo", inner, hidden, layer=layer)
            add.norm(f"{feed}.layer_norm", hidden, layer=layer)
        add.norm(f"{stack}.final_layer_norm", hidden)
    # transformers ties T5's projection to its embedding whatever config.json says.
    return Architecture(
        kind="t5",
        tensors=tuple(add.found),
        layers=c["num_layers"] + decoder_layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=heads,
        head_dim=width,
        vocabulary=c["vocab_size"],
        gated=gated,
        tied=True,
        norms=3,
        encoder_decoder=True,
    )


def bart(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """Describe BART (Lewis et al. 2020, arXiv:1910.13461). Layers count encoder and decoder together."""
    hidden = c["d_model"]
    add = Collector()
    add.table("model.shared", c["vocab_size"], hidden)
    for stack in ("encoder", "decoder"):
        inner = c[f"{stack}_ffn_dim"]
        add.table(f"model.{stack}.embed_positions", c["max_position_embeddings"] + 2, hidden)
        for index in range(c[f"{stack}_layers"]):
            layer = index + (c["encoder_layers"] if stack == "decoder" else 0)
            at = f"model.{stack}.layers.{index}"
            for attention in ("self_attn", "encoder_attn") if stack == "decoder" else ("self_attn",):
                for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    add.linear(f"{at}.{attention}.{name}", hidden, hidden, bias=True, layer=layer)
                add.norm(f"{at}.{attention}_layer_norm", hidden, bias=True, layer=layer)
            add.linear(f"{at}.fc1", hidden, inner, bias=True, layer=layer)
            add.linear(f"{at}.fc2", inner, hidden, bias=True, layer=layer)
            add.norm(f"{at}.final_layer_norm", hidden, bias=True, layer=layer)
        add.norm(f"model.{stack}.layernorm_embedding", hidden, bias=True)
    if head == LANGUAGE_MODEL and not c["tie_word_embeddings"]:
        add.linear("lm_head", hidden, c["vocab_size"])
    heads = c["encoder_attention_heads"]
    return Architecture(
        kind="bart",
        tensors=tuple(add.found),
        layers=c["encoder_layers"] + c["decoder_layers"],
        hidden=hidden,
        intermediate=c["encoder_ffn_dim"],
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=c["vocab_size"],
        gated=False,
        tied=bool(c["tie_word_embeddings"]),
        norms=3,
        encoder_decoder=True,
    )
