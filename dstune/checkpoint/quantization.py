"""The formats of `dstune export --quantize`, and the packages that each of them needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError

NUMPY_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""GGUF types that the package `gguf` computes."""
K_TYPES = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
"""GGUF types that llama.cpp computes."""
GGUF_TYPES = (*NUMPY_TYPES, *K_TYPES)
FORMATS = ("fp8", "awq", *(f"gguf:{kind}" for kind in GGUF_TYPES))

Measure = Callable[[Path, Path], "Mapping[str, Any] | None"]
"""(run, folder of a complete model) -> `rows`, `split` and `metrics` on the run's held-out rows; None if the run has none."""


@dataclass(frozen=True)
class Quantization:
    """A format of `--quantize`."""

    format: str
    """`fp8`, `awq` or `gguf`."""
    type: str = ""
    """GGUF only: `q8_0`, `q4_k_m`, ..."""

    def __str__(self) -> str:
        return f"{self.format}:{self.type}" if self.type else self.format


PACKAGES = {
    "fp8": (("accelerate", "compressed_tensors"), "quantized"),
    "awq": (("accelerate", "auto_round", "compressed_tensors"), "awq"),
    "k": (("llama_cpp",), "kquants"),
}
"""For each format the modules that it needs, and dstune's extra that installs them; `k` stands for the K types of GGUF."""


def parse_quantization(text: str) -> Quantization:
    """Return the format that `text` names. Raises UserError."""
    if text not in FORMATS:
        fix = f"fp8, awq, or gguf:TYPE with one of {', '.join(GGUF_TYPES)}"
        raise UserError(Problem("--quantize", "there is no such format", fix, text))
    name, _, kind = text.partition(":")
    return Quantization(name, kind)


def require_package(quantization: Quantization) -> None:
    """Raise UserError if a package that the format needs is not installed; the error names dstune's extra."""
    name = "k" if quantization.type in K_TYPES else quantization.format
    modules, extra = PACKAGES.get(name, ((), ""))
    missing = [module.replace("_", "-") for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        reason = f"needs packages that are not installed: {', '.join(missing)}"
        fix = f"pip install '.[{extra}]' in a clone of dstune"
        raise UserError(Problem("--quantize", reason, fix, str(quantization)))
