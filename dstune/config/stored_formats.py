"""Bases whose weights are stored in few bits: from `config.json` alone, so before anything is downloaded.

FP8 and MXFP4 weights are put back to 16 bits (fp32 where a run computes in it) while they are loaded, and trained so; memory is
that of a model which was never rounded. What transformers cannot put back is refused with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstune.core.errors import Problem

COMPRESSED = {
    "float-quantized": "FP8",
    "naive-quantized": "FP8 or 8-bit integers",
    "int-quantized": "8-bit integers",
    "pack-quantized": "4-bit integers",
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
}
"""Formats of the package compressed-tensors, and what they hold."""
OWN_BITS = "bitsandbytes"
"""Weights that `method=qlora` trains on as they are."""


@dataclass(frozen=True)
class StoredFormat:
    """How the weights of a checkpoint are stored."""

    name: str
    """As people say it: `FP8`, `MXFP4`, `GPTQ`."""
    package: str = ""
    """What has to be installed to put its weights back to 16 bits."""
    obstacle: str = ""
    """Why they cannot be put back; empty where they can."""


def stored_format(values: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format of the weights that a whole `config.json` tells of; None where they are plain numbers, or bitsandbytes'."""
    settings = quantization_of(values)
    if settings is None:
        return (
            StoredFormat("MLX", obstacle="only MLX reads them")
            if isinstance(values.get("quantization"), dict)
            else None
        )
    method = str(settings.get("quant_method") or "").lower()
    match method:
        case "fp8":
            return StoredFormat("FP8", "accelerate")  # transformers asks for it before it looks at the weights
        case "mxfp4":
            return StoredFormat("MXFP4")
        case "compressed-tensors":
            format_name = str(settings.get("format"))
            format_title = COMPRESSED.get(format_name)
            obstacle = "" if format_title else f"compressed-tensors' format {format_name} is not known here"
            return StoredFormat(format_title or format_name, "compressed-tensors", obstacle)
        case "bitsandbytes":
            return None
        case "":
            return StoredFormat("MLX", obstacle="only MLX reads them")
        case "modelopt" | "modelopt_fp4":
            kind = str(settings.get("quant_algo") or "NVFP4")
            return StoredFormat(f"{kind} of ModelOpt", obstacle="transformers has no reader for them")
    return StoredFormat(
        method.upper(), obstacle="they are for inference: no gradient passes, and nothing puts them back"
    )


def quantization_of(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return `quantization_config` of a whole `config.json`, its own or the language model's."""
    for place in (values, values.get("text_config")):
        settings = place.get("quantization_config") if isinstance(place, Mapping) else None
        if isinstance(settings, Mapping):
            return settings
    return None


def stored_format_problem(values: Mapping[str, Any], path: str, *, quantizes: bool) -> Problem | None:
    """Return why a model with this `config.json` cannot be trained from, by how it is stored.

    quantizes: whether the method rounds the weights itself, as `method=qlora` does.
    """
    stored = stored_format(values)
    if stored is None:
        return None
    statement = f"its weights are stored in {stored.name}"
    if stored.obstacle:
        fix = "the model it was made from, in 16 bits (its card names it)"
        return Problem("model.path", f"{statement}, and {stored.obstacle}", fix, path)
    if stored.package and importlib.util.find_spec(stored.package.replace("-", "_")) is None:
        reason = f"{statement}, and reading them takes the package {stored.package}, which is not installed"
        return Problem("model.path", reason, "pip install '.[quantized]' in a clone of dstune", path)
    if quantizes:
        reason = f"{statement}, and this method rounds weights in 16 bits to 4 while it loads them"
        return Problem("method", reason, "method=lora, or a copy of the model in 16 bits", "qlora")
    return None
