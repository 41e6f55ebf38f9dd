"""Encoders of one stack: BERT and its kin, DeBERTa, ModernBERT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dstune.planning.architectures.tensors import BODY, CLASSIFIER, TOKEN_CLASSIFIER, Architecture, Collector

_BERT = {"max_position_embeddings": 512, "type_vocab_size": 2, "tie_word_embeddings": True, "hidden_dropout_prob": 0.1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "deberta-v2": {
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "position_biased_input": True,
        "relative_attention": False,
        "max_relative_positions": -1,
        "position_buckets": -1,
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "pos_att_type": None,
        "tie_word_embeddings": True,
        "hidden_dropout_prob": 0.1,
    },
    "modernbert": {
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_bias": False,
        "classifier_bias": False,
        "local_attention": 128,
        "tie_word_embeddings": True,
    },
}
"""What transformers assumes where config.json leaves a value out."""


def bert(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """Describe BERT and RoBERTa: learned positions, norms behind the sums."""
    roberta = c["model_type"] != "bert"
    body = "roberta" if roberta else "bert"
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    add = Collector()
    at = f"{body}.embeddings"
    add.table(f"{at}.word_embeddings", c["vocab_size"], hidden)
    add.table(f"{at}.position_embeddings", c["max_position_embeddings"], hidden)
    add.table(f"{at}.token_type_embeddings", c["type_vocab_size"], hidden)
    add.norm(f"{at}.LayerNorm", hidden, bias=True)
    for index in range(c["num_hidden_layers"]):
        at = f"{body}.encoder.layer.{index}"
        for name in ("query", "key", "value"):
            add.linear(f"{at}.attention.self.{name}", hidden, hidden, bias=True, layer=index)
        _bert_rest(add, at, hidden, inner, index)
    if roberta:
        if head == CLASSIFIER:
            add.linear("classifier.dense", hidden, hidden, bias=True)
            add.linear("classifier.out_proj", hidden, labels, bias=True)
    elif head in (CLASSIFIER, BODY):
        add.linear(f"{body}.pooler.dense", hidden, hidden, bias=True)
    if head == TOKEN_CLASSIFIER or (head == CLASSIFIER and not roberta):
        add.linear("classifier", hidden, labels, bias=True)
    return _encoder(c, add)


def _bert_rest(add: Collector, at: str, hidden: int, inner: int, index: int) -> None:
    add.linear(f"{at}.attention.output.dense", hidden, hidden, bias=True, layer=index)
    add.norm(f"{at}.attention.output.LayerNorm", hidden, bias=True, layer=index)
    add.linear(f"{at}.intermediate.dense", hidden, inner, bias=True, layer=index)
    add.linear(f"{at}.output.dense", inner, hidden, bias=True, layer=index)
    add.norm(f"{at}.output.LayerNorm", hidden, bias=True, layer=index)


def deberta(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """Describe DeBERTa v2 and v3 (He et al. 2021, arXiv:2006.03654): attention to content and to relative positions."""
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    add = Collector()
    at = "deberta.embeddings"
    add.table(f"{at}.word_embeddings", c["vocab_size"], hidden)
    if c["position_biased_input"]:
        add.table(f"{at}.position_embeddings", c["max_position_embeddings"], hidden)
    if c["type_vocab_size"] > 0:
        add.table(f"{at}.token_type_embeddings", c["type_vocab_size"], hidden)
    add.norm(f"{at}.LayerNorm", hidden, bias=True)
    kinds = c["pos_att_type"] or []
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    own_keys = c["relative_attention"] and not c["share_att_key"]
    for index in range(c["num_hidden_layers"]):
        at = f"deberta.encoder.layer.{index}"
        for name in ("query_proj", "key_proj", "value_proj"):
            add.linear(f"{at}.attention.self.{name}", hidden, hidden, bias=True, layer=index)
        if own_keys and "c2p" in kinds:
            add.linear(f"{at}.attention.self.pos_key_proj", hidden, hidden, bias=True, layer=index)
        if own_keys and "p2c" in kinds:
            add.linear(f"{at}.attention.self.pos_query_proj", hidden, hidden, bias=True, layer=index)
        _bert_rest(add, at, hidden, inner, index)
    if c["relative_attention"]:
        farthest = c["max_relative_positions"] if c["max_relative_positions"] >= 1 else c["max_position_embeddings"]
        buckets = c["position_buckets"] if c["position_buckets"] > 0 else farthest
        add.table("deberta.encoder.rel_embeddings", 2 * buckets, hidden)
    if "layer_norm" in c["norm_rel_ebd"]:
        add.norm("deberta.encoder.LayerNorm", hidden, bias=True)
    if head == CLASSIFIER:
        add.linear("pooler.dense", hidden, hidden, bias=True)
    if head in (CLASSIFIER, TOKEN_CLASSIFIER):
        add.linear("classifier", hidden, labels, bias=True)
    return replace(_encoder(c, add), relative_attention=bool(c["relative_attention"]))


def modernbert(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """Describe ModernBERT (Warner et al. 2024, arXiv:2412.13663)."""
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], bool(c["norm_bias"])
    attention_bias, mlp_bias = bool(c["attention_bias"]), bool(c["mlp_bias"])
    add = Collector()
    add.table("model.embeddings.tok_embeddings", c["vocab_size"], hidden)
    add.norm("model.embeddings.norm", hidden, bias=bias)
    for index in range(c["num_hidden_layers"]):
        at = f"model.layers.{index}"
        if index:  # the embeddings are normed already
            add.norm(f"{at}.attn_norm", hidden, bias=bias, layer=index)
        add.linear(f"{at}.attn.Wqkv", hidden, 3 * hidden, bias=attention_bias, layer=index)
        add.linear(f"{at}.attn.Wo", hidden, hidden, bias=attention_bias, layer=index)
        add.norm(f"{at}.mlp_norm", hidden, bias=bias, layer=index)
        add.linear(f"{at}.mlp.Wi", hidden, 2 * inner, bias=mlp_bias, layer=index)
        add.linear(f"{at}.mlp.Wo", inner, hidden, bias=mlp_bias, layer=index)
    add.norm("model.final_norm", hidden, bias=bias)
    if head in (CLASSIFIER, TOKEN_CLASSIFIER):
        add.linear("head.dense", hidden, hidden, bias=bool(c["classifier_bias"]))
        add.norm("head.norm", hidden, bias=bias)
        add.linear("classifier", hidden, labels, bias=True)
    layers = c["num_hidden_layers"]
    windowed = layers - -(-layers // int(c.get("global_attn_every_n_layers") or 3))
    return replace(_encoder(c, add), gated=True, window=c["local_attention"], windowed_layers=windowed)


def _encoder(c: dict[str, Any], add: Collector) -> Architecture:
    heads = c["num_attention_heads"]
    return Architecture(
        kind=c["model_type"],
        tensors=tuple(add.found),
        layers=c["num_hidden_layers"],
        hidden=c["hidden_size"],
        intermediate=c["intermediate_size"],
        heads=heads,
        kv_heads=heads,
        head_dim=c["hidden_size"] // heads,
        vocabulary=c["vocab_size"],
        gated=False,
        tied=bool(c["tie_word_embeddings"]),
        norms=2,
        encoder=True,
    )
