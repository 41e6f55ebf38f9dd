"""Dequantizes weights that are stored in FP8 or MXFP4 to the run's number format on loading."""

from __future__ import annotations

from transformers import PretrainedConfig

from dstune.config.stored_formats import OWN_BITS


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
        else:
            del config.quantization_config
