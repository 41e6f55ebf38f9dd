"""Every tensor of a model from its `config.json` alone: names and shapes as `named_parameters()` of transformers lists them.

Tied weights appear once, as they do there. `tests/unit/test_plan_architecture.py` holds this against models that
transformers builds on the meta device, name by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from dstune.config.architectures import size_problems
from dstune.config.parallel_rules import INWARD, OUTWARD
from dstune.core.errors import Problem, UserError

LANGUAGE_MODEL = "language model"
CLASSIFIER = "classifier"
TOKEN_CLASSIFIER = "token classifier"
BODY = "body"

# What transformers assumes where config.json leaves a value out.
_LLAMA = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "head_dim": None}
_BERT = {
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
    "hidden_dropout_prob": 0.1,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {"tie_word_embeddings": False, "head_dim": None, "num_key_value_heads": 8},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"attention_bias": False, "tie_word_embeddings": False, "head_dim": 128},
    "gemma": {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 256},
    "gemma2": {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 256},
    "gemma3_text": {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 256, "vocab_size": 262208},
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
    "t5": {
        "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32,
        "num_decoder_layers": None,
        "dropout_rate": 0.1,
    },
    "bart": {"max_position_embeddings": 1024, "tie_word_embeddings": True, "dropout": 0.1},
}


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    linear: bool = False
    """The weight of a linear layer, which an adapter may wrap."""
    layer: int | None = None
    """Index of the block it belongs to; None for embeddings, the last norm and the head."""
    used: float = 0.0
    """Share of the positions that are multiplied by it: all by a linear layer, by an expert those that are sent to it."""

    @cached_property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Architecture:
    """What memory and time depend on."""

    kind: str
    """`model_type` of config.json."""
    tensors: tuple[Tensor, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool
    """A feed-forward layer of gate, up and down projection."""
    tied: bool
    """The vocabulary projection is the embedding's weight."""
    norms: int
    """Norms over the hidden size in a layer."""
    query_norm: bool = False
    encoder: bool = False
    encoder_decoder: bool = False
    relative_attention: bool = False
    """DeBERTa: scores of positions are added to those of content, whole matrices of them."""
    window: int | None = None
    """Sliding window of attention in tokens, of `windowed_layers` layers."""
    windowed_layers: int = 0
    soft_capped: bool = False
    experts: int = 0
    """Experts that a position is sent to in a feed-forward layer that is made of them; `intermediate` is that of all of these
    together."""

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.count for tensor in self.tensors)

    def of_layer(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.layer == index)

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of the largest layer."""
        counts: dict[int, int] = {}
        for tensor in self.tensors:
            if tensor.layer is not None:
                counts[tensor.layer] = counts.get(tensor.layer, 0) + tensor.count
        return max(counts.values(), default=0)


def architecture(config: Mapping[str, Any], head: str = LANGUAGE_MODEL, labels: int = 2) -> Architecture:
    """The architecture that a `config.json` describes, with the head of a task.

    head: `LANGUAGE_MODEL`, `CLASSIFIER` (of texts), `TOKEN_CLASSIFIER` or `BODY`.

    Raises:
        UserError: an architecture whose memory is not known here, or a value that is missing.
    """
    kind = str(config.get("model_type", ""))
    if kind not in DEFAULTS:
        known = ", ".join(sorted(DEFAULTS))
        reason = f"the planner does not know the architecture {kind or '(config.json names none)'}"
        raise UserError(Problem("model.path", reason, f"it knows {known}"))
    values = dict(DEFAULTS[kind]) | {key: value for key, value in config.items() if value is not None}
    if problems := size_problems(values):
        raise UserError(problems)
    try:
        found = _BUILDERS[kind](values, head, labels)
        if all(isinstance(length, int) for tensor in found.tensors for length in tensor.shape):
            return found
        reason = "its config.json has a size that is no whole number"
    except KeyError as missing:
        reason = f"its config.json has no {missing.args[0]}"
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"its config.json has a value of another kind than a model's: {error}"
    raise UserError(Problem("model.path", reason, "give a whole config.json"))


def sliced(model: Architecture, parts: int) -> Architecture:
    """What one of `parts` ranks has of a model whose layers they share (`dstune.models.tensor`)."""
    inward = {name for names in INWARD for name in names}

    def slice_of(tensor: Tensor) -> Tensor:
        owner, shape = tensor.name.split(".")[-2], list(tensor.shape)
        if owner in inward:
            shape[0] //= parts
        elif owner in OUTWARD and len(shape) == 2:
            shape[1] //= parts
        return replace(tensor, shape=tuple(shape))

    return replace(
        model,
        tensors=tuple(map(slice_of, model.tensors)),
        heads=model.heads // parts,
        kv_heads=model.kv_heads // parts,
        intermediate=model.intermediate // parts,
    )


class _Tensors:
    """Collects tensors in the order of `named_parameters()`."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = False, layer: int | None = None) -> None:
        self.found.append(Tensor(f"{name}.weight", (outputs, inputs), linear=True, layer=layer, used=1.0))
        if bias:
            self.found.append(Tensor(f"{name}.bias", (outputs,), layer=layer))

    def table(self, name: str, rows: int, width: int, *, layer: int | None = None) -> None:
        self.found.append(Tensor(f"{name}.weight", (rows, width), layer=layer))

    def experts(self, at: str, count: int, chosen: int, inner: int, hidden: int, *, layer: int) -> None:
        """A router and the experts behind it, whose weights transformers stacks."""
        self.found.append(Tensor(f"{at}.gate.weight", (count, hidden), layer=layer, used=1.0))
        for name, shape in (("gate_up_proj", (count, 2 * inner, hidden)), ("down_proj", (count, hidden, inner))):
            self.found.append(Tensor(f"{at}.experts.{name}", shape, layer=layer, used=chosen / count))

    def norm(self, name: str, width: int, *, bias: bool = False, layer: int | None = None) -> None:
        self.found.append(Tensor(f"{name}.weight", (width,), layer=layer))
        if bias:
            self.found.append(Tensor(f"{name}.bias", (width,), layer=layer))


QUERY_NORM = ("qwen3", "qwen3_moe", "gemma3_text")
FOUR_NORMS = ("gemma2", "gemma3_text")
"""Kinds of decoders that normalise queries and keys, and those that normalise what a block adds as well."""


def _decoder(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """Llama and its kin: Mistral, Qwen 2 and 3, Gemma 1 to 3, SmolLM3; Mixtral and Qwen 3 with experts."""
    kind, layers, hidden = c["model_type"], c["num_hidden_layers"], c["hidden_size"]
    heads, kv_heads, head_dim = _heads(c)
    routed = _routed_layers(c)
    experts = c["num_experts_per_tok"] if routed else 0
    add = _Tensors()
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
    """Heads of queries, of keys and values, and the width of one."""
    heads = c["num_attention_heads"]
    return heads, c.get("num_key_value_heads") or heads, c.get("head_dim") or c["hidden_size"] // heads


def _decoder_layer(add: _Tensors, c: dict[str, Any], index: int, *, experts: int) -> None:
    """experts: that a token is sent to; 0 where the layer has one feed-forward part."""
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
    """Layers whose feed-forward part is made of experts (of Qwen 3 every `decoder_sparse_step`th may be)."""
    layers = range(c["num_hidden_layers"])
    match c["model_type"]:
        case "mixtral":
            return layers
        case "qwen3_moe":
            dense = c["mlp_only_layers"] or ()
            return [n for n in layers if n not in dense and _experts(c) and (n + 1) % c["decoder_sparse_step"] == 0]
    return []


def _experts(c: dict[str, Any]) -> int:
    return int(c["num_local_experts"] if c["model_type"] == "mixtral" else c["num_experts"])


def _expert_inner(c: dict[str, Any]) -> int:
    return int(c["intermediate_size"] if c["model_type"] == "mixtral" else c["moe_intermediate_size"])


def _bert(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """BERT and RoBERTa: learned positions, norms behind the sums."""
    roberta = c["model_type"] != "bert"
    body = "roberta" if roberta else "bert"
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    add = _Tensors()
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


def _bert_rest(add: _Tensors, at: str, hidden: int, inner: int, index: int) -> None:
    add.linear(f"{at}.attention.output.dense", hidden, hidden, bias=True, layer=index)
    add.norm(f"{at}.attention.output.LayerNorm", hidden, bias=True, layer=index)
    add.linear(f"{at}.intermediate.dense", hidden, inner, bias=True, layer=index)
    add.linear(f"{at}.output.dense", inner, hidden, bias=True, layer=index)
    add.norm(f"{at}.output.LayerNorm", hidden, bias=True, layer=index)


def _deberta(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """DeBERTa v2 and v3 (He et al. 2021, arXiv:2006.03654): attention to content and to relative positions."""
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    add = _Tensors()
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


def _modernbert(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """ModernBERT (Warner et al. 2024, arXiv:2412.13663)."""
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], bool(c["norm_bias"])
    attention_bias, mlp_bias = bool(c["attention_bias"]), bool(c["mlp_bias"])
    add = _Tensors()
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


def _encoder(c: dict[str, Any], add: _Tensors) -> Architecture:
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


def _t5(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """T5 (Raffel et al. 2020, arXiv:1910.10683). Layers count encoder and decoder together."""
    hidden, inner, heads, width = c["d_model"], c["d_ff"], c["num_heads"], c["d_kv"]
    gated = str(c["feed_forward_proj"]).startswith("gated-")
    add = _Tensors()
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


def _bart(c: dict[str, Any], head: str, labels: int) -> Architecture:
    """BART (Lewis et al. 2020, arXiv:1910.13461). Layers count encoder and decoder together."""
    hidden = c["d_model"]
    add = _Tensors()
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


_BUILDERS = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen3",
            "qwen3_moe",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
        ),
        _decoder,
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _bert),
    "deberta-v2": _deberta,
    "modernbert": _modernbert,
    "t5": _t5,
    "bart": _bart,
}
