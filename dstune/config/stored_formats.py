"""Recognizes base models whose weights are quantized, by `config.json` alone and so before anything is downloaded.

FP8 and MXFP4 weights are converted back to 16 bits (to fp32 if the run computes in fp32) while they are loaded, and trained that
way, so the run takes as much memory as with a model that was never quantized. Formats that transformers cannot convert back are
refused with the reason.
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
"""Formats of the package compressed-tensors, and the numbers that they contain."""
OWN_BITS = "bitsandbytes"
"""The `quant_method` of 4-bit weights that `method=qlora` uses unchanged."""


@dataclass(frozen=True)
class StoredFormat:
    """How the weights of a checkpoint are stored."""

    name: str
    """The usual name: `FP8`, `MXFP4`, `GPTQ`."""
    package: str = ""
    """The package that converts the weights back to 16 bits; empty if transformers needs none."""
    obstacle: str = ""
    """Why they cannot be converted back; empty if they can."""


def stored_format(values: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format of quantized weights; None if they are not quantized, or by bitsandbytes. values: a complete
    `config.json`."""
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
        method.upper(), obstacle="they are for inference only: gradients cannot pass, and nothing converts them back"
    )


def quantization_of(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return `quantization_config` of a complete `config.json`: that of the file, or of the language model in it."""
    for place in (values, values.get("text_config")):
        settings = place.get("quantization_config") if isinstance(place, Mapping) else None
        if isinstance(settings, Mapping):
            return settings
    return None


def stored_format_problem(values: Mapping[str, Any], path: str, *, quantizes: bool) -> Problem | None:
    """Return the problem if training cannot start from the format of a model's weights; else None.

    values: the model's `config.json`. path: the model, as the user gave it. quantizes: whether the method quantizes the weights
    itself, as `method=qlora` does.
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
        reason = f"{statement}, and this method needs weights in 16 bits, which it quantizes to 4 bits while loading"
        return Problem("method", reason, "method=lora, or a copy of the model in 16 bits", "qlora")
    return None
