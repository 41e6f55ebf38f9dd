"""The user's model of transformers, shrunken: the same code with two small layers and weights from the formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dstune_verify.cases import CannotRun
from dstune_verify.models import Batch
from dstune_verify.small_configurations import BY_KIND, HEADS, is_window, merged, shrunk

MOST_PARAMETERS = 3_000_000
WINDOW = 4
"""Positions that a sliding window sees: fewer than the rows have."""
LABELS = ("num_labels", "id2label", "label2id")
NOT_READ = ("auto_map", "quantization_config", "architectures", "transformers_version", "dtype", "torch_dtype", *LABELS)
HEADS_OF_KEYS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")


IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
"""Those in transformers itself. Any other name of `attn_implementation` or `experts_implementation` makes it load and run kernels
that a hub has."""
MOST_LAYERS = 10_000


class CannotShrink(CannotRun):
    """The configuration does not give a small model."""


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with small sizes and two layers, or as many as show each kind. As many heads of keys as of queries stay
    as many."""
    if isinstance(config.get("text_config"), dict):
        raise CannotShrink("models with images or sound are not compared")
    config = _without_kernels(config)
    values = {key: value for key, value in config.items() if not key.startswith("_") and key not in NOT_READ}
    small = merged(shrunk(values), BY_KIND.get(str(values.get("model_type")), {}))
    small |= {name: min(WINDOW, size) for name, size in small.items() if is_window(name) and isinstance(size, int)}
    heads = next((config[name] for name in ("num_attention_heads", "n_head", "num_heads") if name in config), HEADS)
    small |= {name: HEADS for name in HEADS_OF_KEYS if isinstance(config.get(name), int) and config[name] >= heads}
    for name, value in small.items():
        if isinstance(value, int) and value > MOST_LAYERS and ("layer" in name or name.startswith("num_")):
            raise CannotShrink(f"{name} is {value:,}")
    return small


def _without_kernels(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `config`, in which no part names an implementation outside of transformers."""
    return {
        key: _without_kernels(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not key.endswith("_implementation") or value in IMPLEMENTATIONS
    }


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
