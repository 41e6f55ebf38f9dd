"""Sets the first values of LoRA adapters: a split of the weights (PiSSA, OLoRA, QR) or LoftQ; and shifts frozen weights.

A split, or a finished adapter below the new one, adds a fixed low-rank matrix to a frozen weight: minus the new adapter's first
product, or plus the product of the finished adapter. Its factors are kept with the weight as buffers (`shift_A` [rank, in],
`shift_B` [out, rank]), so checkpoints have them. An export is one plain adapter on the unchanged base: its matrices are the
trained ones and the shift's, concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dstune.checkpoint.adapters import ADAPTED
from dstune.core.errors import Problem, UserError
from dstune.methods.lora.config import LoraConfig, LoraInit
from dstune.models.quantize import dequantized, is_quantized
from dstune.zero.parts import gathered

SHIFT_A, SHIFT_B = "shift_A", "shift_B"


Originals = Callable[[str, Mapping[str, torch.Size]], Mapping[str, Tensor]]
"""Maps (prefix of the body's parameters, shapes by name) to the weights as the model's files have them."""


def start_lora(adapted: Any, config: LoraConfig, originals: Originals) -> None:
    """Give every adapter of `adapted` (a PeftModel) the first values of `config.init`. Every rank must call it.

    Raises UserError if a layer is not linear or has too few rows or columns for the rank.
    """
    if config.init is LoraInit.loftq:
        _make_up_for_rounding(adapted, originals)
    if config.init not in (LoraInit.pissa, LoraInit.olora, LoraInit.qr):
        return
    for name, layer in lora_layers(adapted):
        base: Any = layer.get_base_layer()
        if not isinstance(base, nn.Linear):
            reason = f"init={config.init.value} splits the weights of linear layers, and {name} is none"
            raise UserError(Problem("method.init", reason, "method.init=default, or other target_modules"))
        if base.weight.device.type == "meta":  # an export, which takes everything from the checkpoint
            continue
        scale, rank = layer.scaling["default"], layer.r["default"]
        parameter: Any = base.weight
        with gathered([parameter]), torch.no_grad():
            weight = parameter.detach().float()
            if rank > min(weight.shape):
                reason = f"{name} has a weight of {'x'.join(map(str, weight.shape))}, which has no part of this rank"
                raise UserError(Problem("method.rank", reason, f"at most {min(weight.shape)}", str(rank)))
            first, second = _split(weight, rank, config)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        share = 1.0 if config.init is LoraInit.olora else scale**0.5  # peft leaves the factors of OLoRA as they are
        with torch.no_grad():  # rounded to the adapter's dtype first: the shift must subtract the rounded values
            a.copy_(first / share)
            b.copy_(second / share)
            shift(base, a.float(), -scale * b.float())


def _make_up_for_rounding(adapted: Any, originals: Originals) -> None:
    """Set the first values by the first iteration of LoftQ (Li et al. 2023, arXiv:2310.08659): the best low-rank approximation of
    the difference between the weights and their 4-bit values. The 4-bit values stay the base's, so the export works with any copy
    of the base."""
    layers = {name.removeprefix(ADAPTED): layer for name, layer in lora_layers(adapted) if is_quantized(layer)}
    shapes = {f"{name}.weight": layer.get_base_layer().weight.quant_state.shape for name, layer in layers.items()}
    weights = originals(adapted.get_base_model().base_model_prefix, shapes)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        with torch.no_grad():
            lost = weights[f"{name}.weight"].to(weight.device).float() - dequantized(weight).float()
            u, s, vh = torch.linalg.svd(lost, full_matrices=False)
            rank, scale = layer.r["default"], layer.scaling["default"]
            layer.lora_A["default"].weight.copy_((s[:rank] / scale).sqrt()[:, None] * vh[:rank])
            layer.lora_B["default"].weight.copy_(u[:, :rank] * (s[:rank] / scale).sqrt())


def _split(weight: Tensor, rank: int, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """Return the factors [rank, in] and [out, rank] of the part of `weight` [out, in] that the adapter takes over."""
    if config.init in (LoraInit.olora, LoraInit.qr):
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if config.init_iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=config.init_iterations)
        vh = v.T
    return s.sqrt()[:, None] * vh, u * s.sqrt()


def shift(base: nn.Linear, a: Tensor, b: Tensor) -> None:
    """Add `b @ a` to the frozen weight and keep the factors, fp32 [rank, in] and [out, rank]. Every rank must call it."""
    weight: Any = base.weight
    with gathered([weight], modified_by_rank=0), torch.no_grad():
        weight.copy_(weight.float() + b @ a)
    before_a, before_b = getattr(base, SHIFT_A, None), getattr(base, SHIFT_B, None)
    base.register_buffer(SHIFT_A, a.clone() if before_a is None else torch.cat([before_a, a]))
    base.register_buffer(SHIFT_B, b.clone() if before_b is None else torch.cat([before_b, b], dim=1))


def lora_layers(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with a LoRA adapter, by the name of the module that they replace."""
    from peft.tuners.lora import LoraLayer

    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
