"""Recognizes base models whose weights are quantized, by `config.json` alone and so before anything is downloaded.

FP8 and MXFP4 weights are converted back to 16 bits (to fp32 if the run computes in fp32) while they are loaded, and trained that
way, so the run takes as much memory as with a model that was never quantized. Formats that transformers cannot convert back are
refused with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem
from dstune.core.parsing import object_in, read_object
from dstune.protocols import Method
from dstune.protocols.method_options import QuantizesWeights

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
            obstacle = (
                _obstacle(settings) if format_title else f"compressed-tensors' format {format_name} is not known here"
            )
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


def _obstacle(settings: Mapping[str, Any]) -> str:
    """Return why weights of a known format of compressed-tensors cannot be converted back; empty if they can."""
    groups = settings.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)]
    if any(scheme.get("actorder") in ("group", True) for scheme in weights):
        return "their columns are in the order of their activations (actorder: group), which is no longer read"
    for of_experts in (False, True):  # transformers converts experts by their own group, and all else by the first
        targets = [(scheme, str(group.get("targets"))) for scheme, group in zip(weights, groups, strict=False)]
        schemes = [scheme for scheme, target in targets if ("experts" in target) == of_experts]
        if any(scheme != schemes[0] for scheme in schemes):
            return "some layers are stored in another format than others, and transformers reads all as the first"
    return ""


def read_description(folder: Path) -> dict[str, Any] | None:
    """Return the `config.json` in `folder`, with what ModelOpt says of its quantization; None if there is none."""
    values = read_object(folder / "config.json")
    return None if values is None else with_modelopt(values, folder)


def with_modelopt(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a `config.json` with the quantization that earlier versions of ModelOpt write to a file of its own in `folder`."""
    if quantization_of(values) is not None:
        return values
    settings = object_in(folder / "hf_quant_config.json").get("quantization")
    return (
        values | {"quantization_config": {"quant_method": "modelopt", **settings}}
        if isinstance(settings, dict)
        else values
    )


def quantization_of(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return `quantization_config` of a complete `config.json`: that of the file, or of the language model in it."""
    for place in (values, values.get("text_config")):
        settings = place.get("quantization_config") if isinstance(place, Mapping) else None
        if isinstance(settings, Mapping):
            return settings
    return None


def bitsandbytes_bits(values: Mapping[str, Any]) -> int | None:
    """Return the bits of a weight, 4 or 8, if bitsandbytes quantized the weights; else None."""
    settings = quantization_of(values) or {}
    if str(settings.get("quant_method")).lower() != OWN_BITS:
        return None
    return 8 if settings.get("load_in_8bit") else 4


def describe_stored_format(values: Mapping[str, Any]) -> str:
    """Say how the weights are stored and what happens to them on loading; empty if they are not quantized, or cannot be read."""
    if (bits := bitsandbytes_bits(values)) is not None:
        return f"its weights are stored in {bits} bits by bitsandbytes, and stay so"
    stored = stored_format(values)
    if stored is None or stored.obstacle:
        return ""
    return f"its weights are stored in {stored.name} and dequantized while they are loaded"


def stored_format_problem(values: Mapping[str, Any], path: str, method: Method) -> Problem | None:
    """Return the problem if training cannot start from the format of a model's weights; else None.

    values: the model's `config.json`. path: the model, as the user gave it.
    """
    quantizes = isinstance(method, QuantizesWeights)
    if (bits := bitsandbytes_bits(values)) is not None and not method.adapter:
        reason = f"its weights are stored in {bits} bits by bitsandbytes, and so cannot be trained themselves"
        adapters = "method=qlora" if bits == 4 else "method=lora"
        return Problem("method", reason, f"{adapters}, or a copy of the model in 16 bits", method.name)
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
        return Problem("method", reason, "method=lora, or a copy of the model in 16 bits", method.name)
    return None
