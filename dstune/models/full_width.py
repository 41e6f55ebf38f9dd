"""Dequantizes weights that are stored in FP8 or MXFP4 to the run's number format on loading."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dstune.config.stored_formats import OWN_BITS
from dstune.core.errors import Problem, UserError

SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_g_idx", "g_idx", "SCB")
"""Last parts of the names of tensors without which quantized weights have other values."""


def put_back_to_full_width(architecture: PretrainedConfig, *, pretrained: bool) -> None:
    """Make transformers dequantize weights that the checkpoint stores in few bits, on any hardware.

    Otherwise weights stay in FP8 on GPUs with kernels for it, where they cannot be trained. pretrained: whether weights are loaded;
    new ones have full width.
    """
    for config in (architecture, architecture.get_text_config()):
        settings = getattr(config, "quantization_config", None)
        if not isinstance(settings, dict) or settings.get("quant_method") == OWN_BITS:
            continue
        if pretrained:
            settings["dequantize"] = True
            if settings.get("quant_method") == "fp8":
                _correct_fp8()
        else:
            del config.quantization_config


def refuse_unread_scales(model: nn.Module, unexpected: Iterable[str], path: str) -> None:
    """Raise UserError if files have scales of weights that the model was loaded without, and so with wrong values.

    unexpected: names of tensors in the files that transformers did not load.
    """
    weights = {name for name, _ in model.named_parameters()}
    parts = [name.rpartition(".") for name in unexpected]
    unread = sorted(f"{owner}.{leaf}" for owner, _, leaf in parts if leaf in SCALES and f"{owner}.weight" in weights)
    if unread:
        reason = (
            f"its weights are quantized, but transformers does not read their scales ({unread[0]}"
            f"{f' and {len(unread) - 1:,} more' if len(unread) > 1 else ''}), so they would have other values"
        )
        fix = "the model it was made from, in 16 bits (its card names it)"
        raise UserError(Problem("model.path", reason, fix, path))


@cache
def _correct_fp8() -> None:
    """Correct how transformers 5.24 dequantizes FP8 in this process.

    It divides each weight evenly among its scales. If a block does not divide the size of a weight, it raises an error (576 rows in
    blocks of 128: DeepSeek V3), or gives rows the scale of a neighbouring block (960 rows). Scales of AutoFP8, `weight_scale`, are
    not read, which leaves the codes as weights.
    """
    from transformers.core_model_loading import WeightRenaming
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    dequantize, conversions = Fp8Dequantize._dequantize_one, FineGrainedFP8HfQuantizer.update_weight_conversions

    @wraps(dequantize)
    def dequantize_padded(self: Any, quantized: Tensor, scales: Tensor, *arguments: Any, **options: Any) -> Tensor:
        block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        size = quantized.shape[-2:]
        if (
            not block
            or scales.ndim < 2
            or tuple(scales.shape[-2:]) != tuple(-(-n // b) for n, b in zip(size, block, strict=True))
        ):
            values: Tensor = dequantize(self, quantized, scales, *arguments, **options)
            return values
        (rows, columns), (missing_rows, missing_columns) = size, (-n % b for n, b in zip(size, block, strict=True))
        padded = nn.functional.pad(quantized.view(torch.uint8), (0, missing_columns, 0, missing_rows))
        values = dequantize(self, padded.view(quantized.dtype), scales, *arguments, **options)
        return values[..., :rows, :columns].contiguous()

    @wraps(conversions)
    def conversions_of_scales(self: Any, *arguments: Any, **options: Any) -> Any:
        renaming = WeightRenaming(source_patterns=r"\.weight_scale$", target_patterns=".weight_scale_inv")
        return [renaming, *conversions(self, *arguments, **options)]

    Fp8Dequantize._dequantize_one = dequantize_padded
    FineGrainedFP8HfQuantizer.update_weight_conversions = conversions_of_scales
