"""Makes DeepSpeed read the norm of a step's gradient from the device only once, together with other scalars of the step.

DeepSpeed itself reads the norm again for every group of the optimizer, and each time the host waits for the device. The
replacement also marks a norm that is not finite without a copy from the host.

Results are the same to the bit. The two functions are replaced in all of DeepSpeed's modules that call them. A version of
DeepSpeed without these functions is not changed, and waits more often (`tests/placement` counts).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

MODULES = ("zero.stage_1_and_2", "zero.stage3", "bf16_optimizer", "utils")


class NormReads:
    """The gradient norm that was last read in this step, and the scalars that were read with it."""

    def __init__(self) -> None:
        self._norm: torch.Tensor | None = None
        self._version = 0
        self._value: float | None = None
        self._scalars: Mapping[str, torch.Tensor] = {}
        self.beside: dict[str, float] = {}
        """Values of `begin_step`'s scalars that are on the same device as the norm."""

    def begin_step(self, scalars: Mapping[str, torch.Tensor] | None = None) -> None:
        """Forget the norm of the previous step. scalars: read together with the norm, which waits for the device anyway."""
        self._norm = self._value = None
        self._scalars, self.beside = scalars or {}, {}

    def value(self, norm: torch.Tensor) -> float:
        """Return the value of `norm`, reading it from the device only if the tensor is a different one than last time or has
        changed."""
        if self._norm is not norm or self._version != norm._version:
            self._norm, self._version, self._value = norm, norm._version, self._read(norm)
        assert self._value is not None
        return self._value

    def _read(self, norm: torch.Tensor) -> float:
        scalars = (
            {}
            if norm.is_cpu
            else {name: scalar for name, scalar in self._scalars.items() if scalar.device == norm.device}
        )
        self._scalars = {}
        if not scalars:
            return float(norm)
        value, *scalar_values = torch.stack([norm.double(), *(scalar.double() for scalar in scalars.values())]).tolist()
        self.beside = dict(zip(scalars, scalar_values, strict=True))
        return float(value)

    @property
    def last(self) -> float | None:
        """The norm that was read since `begin_step`; None if none was."""
        return self._value


reads = NormReads()


def install() -> None:
    """Replace DeepSpeed's two functions in all modules that call them. Does nothing the second time."""
    from deepspeed.runtime import utils

    originals = {name: getattr(utils, name, None) for name in REPLACEMENTS}
    if None in originals.values() or originals["is_invalid_grad_norm"] is is_invalid_grad_norm:
        return
    for path in MODULES:
        module = importlib.import_module(f"deepspeed.runtime.{path}")
        for name, function in REPLACEMENTS.items():
            if getattr(module, name, None) is originals[name]:
                setattr(module, name, function)


def is_invalid_grad_norm(norm: Any) -> bool:
    if isinstance(norm, torch.Tensor) and norm.dim():
        return bool((~torch.isfinite(norm) | (norm < 0)).any())
    value = reads.value(norm) if isinstance(norm, torch.Tensor) else float(norm)
    return not math.isfinite(value) or value < 0


def mask_nan_or_inf_with_val_inplace(input: torch.Tensor, device: Any = None, val: float = -1.0) -> None:
    input.masked_fill_(~torch.isfinite(input), -1.0)


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (is_invalid_grad_norm, mask_nan_or_inf_with_val_inplace)
}
