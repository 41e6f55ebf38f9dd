"""Weights that are stored in FP8 or MXFP4, put back to the run's number format while they are loaded."""

from __future__ import annotations

from transformers import PretrainedConfig

from dstune.config.stored_formats import OWN_BITS


def put_back_to_full_width(architecture: PretrainedConfig, *, pretrained: bool) -> None:
    """Have transformers dequantize what the checkpoint stores in few bits, whatever this machine could compute with.

    Without it, weights stay in FP8 on the GPUs that have kernels for it, where nothing can train them. pretrained: whether weights
    are read at all; new ones are made in full width.
    """
    for config in (architecture, architecture.get_text_config()):
        settings = getattr(config, "quantization_config", None)
        if not isinstance(settings, dict) or settings.get("quant_method") == OWN_BITS:
            continue
        if pretrained:
            settings["dequantize"] = True
        else:
            del config.quantization_config
