"""The user's model of transformers, shrunken: the same code with two small layers and weights from the formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dstune_verify.cases import CannotRun
from dstune_verify.models import VOCABULARY, Batch

MOST_PARAMETERS = 3_000_000
HIDDEN, HEADS = 64, 4
SIZES: dict[tuple[str, ...], int] = {
    ("hidden_size", "n_embd", "d_model", "dim"): HIDDEN,
    ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_hidden", "hidden_dim"): 96,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_dim", "intermediate_size_mlp"): 48,
    ("num_attention_heads", "n_head", "n_heads", "num_heads"): HEADS,
    ("head_dim", "qk_head_dim", "v_head_dim", "qk_nope_head_dim", "global_head_dim"): 16,
    ("qk_rope_head_dim",): 8,
    ("q_lora_rank", "kv_lora_rank"): 16,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_top_k", "num_selected_experts"): 2,
    ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq"): 1,
    ("vocab_size",): 2 * VOCABULARY + 1,
    ("vocab_size_per_layer_input",): 2 * VOCABULARY + 1,
    ("hidden_size_per_layer_input",): 16,
    ("sliding_window",): 4,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"): 64,
}
"""Sizes by the names that configurations have for them. Absent ones stay absent, and null stays null."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class CannotShrink(CannotRun):
    """The configuration does not give a small model."""


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with two layers, or one of each kind, and small sizes. Ratios of heads to key heads stay."""
    small = {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("auto_map", "quantization_config")
    }
    if isinstance(config.get("text_config"), dict):
        raise CannotShrink("models with images or sound are not compared")
    for names, size in SIZES.items():
        for name in names:
            if isinstance(config.get(name), int) and not isinstance(config[name], bool):
                small[name] = min(size, config[name]) if name in ("n_group", "topk_group") else size
    heads = next((config[name] for name in ("num_attention_heads", "n_head", "num_heads") if name in config), HEADS)
    for name in ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"):
        if isinstance(config.get(name), int):
            small[name] = {True: HEADS, False: 2 if config[name] > 1 else 1}[config[name] >= heads]
    layers = next((config[name] for name in LAYERS if isinstance(config.get(name), int)), 2)
    kinds = config.get("layer_types")
    chosen = list(range(min(2, layers)))
    if isinstance(kinds, list) and len(kinds) == layers:
        chosen = sorted({kinds.index(kind) for kind in kinds} | set(chosen))[:4]
    for name, value in config.items():
        if isinstance(value, list) and len(value) == layers and layers > 4:
            small[name] = [value[index] for index in chosen]
    small |= {name: len(chosen) for name in LAYERS if isinstance(config.get(name), int)}
    small |= {name: 0 for name in TOKENS if isinstance(config.get(name), (int, list))}
    small |= {
        name: 0.0
        for name, value in config.items()
        if "dropout" in name or name.endswith("pdrop")
        if isinstance(value, float)
    }
    if isinstance(config.get("qk_rope_head_dim"), int):  # a part of each head is rotated
        small |= {"head_dim": 8, "qk_head_dim": 16 + 8}
    if isinstance(config.get("num_kv_shared_layers"), int):
        small["num_kv_shared_layers"] = 0
    return small


class Network(nn.Module):
    """A causal language model of transformers. `forward` returns the loss of a micro-batch, as that of the tiny models."""

    def __init__(self, config: dict[str, Any], *, lora: bool = False, recomputation: str = "", small: bool = False):
        """small: the configuration is small already."""
        super().__init__()
        self.model = build(config if small else shrink(config))
        self.blocks = next(self._layer_lists())
        if lora:
            import peft

            adapters = peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = peft.get_peft_model(self.model, adapters)
        if recomputation:
            self.model.gradient_checkpointing_enable({"use_reentrant": recomputation == "reentrant"})
            if lora or recomputation == "reentrant":
                self.model.enable_input_require_grads()
        self.train()

    def _layer_lists(self) -> Iterator[nn.ModuleList]:
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList) and len(module)]
        yield from lists or [nn.ModuleList()]

    def forward(self, batch: Batch) -> torch.Tensor:
        logits = self.model(input_ids=batch.tokens[:, :-1], use_cache=False).logits.float()
        losses = functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
        return (losses * batch.weights.flatten().float()).sum()


def build(config: dict[str, Any]) -> Any:
    """Return the model of a small configuration. Code from outside transformers is not run. Raises CannotShrink."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = dict(config)
    kind = small.pop("model_type", "")
    try:
        shrunken = AutoConfig.for_model(kind, **small)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(shrunken).parameters())
        if count > MOST_PARAMETERS:
            raise CannotShrink(f"the shrunken {kind} still has {count:,} parameters")
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small))
    except CannotShrink:
        raise
    except Exception as error:  # whatever the model's code says about sizes that it did not expect
        raise CannotShrink(f"{kind or 'a model without model_type'} cannot be shrunken: {error}") from error
