"""The parameter groups that each method trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dstune.config.method_schema import FreezeConfig, FullConfig, LoraConfig, UlmfitConfig
from dstune.config.schema import RunConfig
from dstune.models.layers import decayed_rates, layers_of
from dstune.optim.groups import parameter_groups


def method_groups(config: RunConfig, module: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's parameter groups for `module`, as `config.method` has trained it."""
    decay = config.optimizer.weight_decay
    match config.method:
        case FullConfig() | FreezeConfig() as method if method.layer_decay < 1:
            assert isinstance(module, PreTrainedModel)
            rates = decayed_rates(layers_of(module), method.layer_decay)
            return parameter_groups(module, decay, rates.__getitem__)
        case UlmfitConfig() as method:
            assert isinstance(module, PreTrainedModel)
            layers = layers_of(module)
            rates = decayed_rates(layers, 1 / method.rate_factor)
            parts = {name: number for number, part in enumerate(layers.parts) for name in part}
            return parameter_groups(module, decay, rates.__getitem__, parts.__getitem__)
        case LoraConfig(lr_ratio=ratio) if ratio != 1:
            # LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B starts at zero and has to catch up with A.
            return parameter_groups(module, decay, lambda name: ratio if ".lora_B." in name else 1.0)
        case _:
            return parameter_groups(module, decay)
