"""Gated activations and rotary positions as one kernel each, by `torch.compile`.

transformers writes `silu(gate) * up` and `q * cos + rotate_half(q) * sin` as chains of operations. On a GPU each of them reads and
writes its whole tensor, rounds to the model's format, and leaves what autograd keeps. Compiled, the chain is one pass that rounds
once: other bits, so a function is taken only where a proof on the device finds it no further away from fp64 than the model's own,
in its outputs and in its gradients. Whole layers are not compiled: their gradients would come in another order.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dstune.config.schema import ModelConfig
from dstune.core.errors import with_class
from dstune.models.norms import CLOSE
from dstune.zero import accelerator

Function = Callable[..., Any]

VARIANTS = 64
"""Compiled variants of a function: with and without gradients, one row and several, each number format. torch's limit is 8."""


def use_compiled(module: nn.Module, config: ModelConfig) -> Iterator[str]:
    """Compile the gated activations and the rotary positions of `module` as `config` requests. Yields the reasons for parts that
    stay uncompiled. Call it before DeepSpeed installs hooks on the modules."""
    if config.fused_activations:
        yield from _reasons("fused_activations", "gated activation", _take_over_gates(module))
    if config.fused_rotary:
        yield from _reasons("fused_rotary", "rotary position", _take_over_rotary(module))


def compiled_functions(module: nn.Module) -> dict[str, bool]:
    """Return which of the two are compiled in any layer of `module`."""
    computing = {
        module_part.forward.func for module_part in module.modules() if isinstance(module_part.forward, partial)
    }
    return {"activations": _gated in computing, "rotary": _rotated in computing}


def _reasons(key: str, part_name: str, problems: Sequence[str]) -> Iterator[str]:
    """Yield the reasons for parts that stay uncompiled. problems: one for each layer of the kind, empty if it is compiled."""
    refused = sorted(set(filter(None, problems))) if problems else [f"the model has no {part_name} of a known form"]
    yield from (f"model.{key}: {problem}; it is computed as the model has it" for problem in refused)


# ---- Gated activations ----


def _take_over_gates(module: nn.Module) -> list[str]:
    problems, kernel_by_key = [], {}
    for layer in module.modules():
        if not _is_gated(layer):
            continue
        if "forward" in vars(layer):
            problems.append("its rows are computed in tiles already")
            continue
        activation: Any = layer.act_fn
        dtype = _dtype_of(layer)
        key = repr(activation), dtype
        if key not in kernel_by_key:
            gate, up = (torch.randn(64, 256, generator=_seeded()) for _ in range(2))
            kernel_by_key[key] = compiled_if_as_exact(partial(_gate, activation), (gate, up), (), dtype)
        kernel, problem = kernel_by_key[key]
        if kernel is not None:
            layer.forward = partial(_gated, layer, kernel)
        problems.append(problem)
    return problems


def _gate(activation: Function, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return activation(gate) * up


def _gated(layer: Any, kernel: Function, hidden_states: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer.down_proj(kernel(layer.gate_proj(hidden_states), layer.up_proj(hidden_states)))
    return result


def _is_gated(layer: Any) -> bool:
    """Return whether a layer computes exactly down(activation(gate(x)) * up(x)), as Llama's does: tested with simple functions in
    place of the projections, whose output must be bit-equal."""
    activation = getattr(layer, "act_fn", None)
    has_projections = all(
        isinstance(getattr(layer, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")
    )
    if not has_projections or not isinstance(activation, nn.Module) or list(activation.parameters()):
        return False
    rows = torch.linspace(-4, 4, 32).reshape(1, 4, 8)
    stand_in: Any = SimpleNamespace(
        act_fn=activation, gate_proj=lambda x: 1.5 * x + 0.25, up_proj=lambda x: 0.5 - x, down_proj=lambda x: 3 * x
    )
    try:
        output = type(layer).forward(stand_in, rows)
    except Exception:  # a layer of another form
        return False
    expected = 3 * (activation(1.5 * rows + 0.25) * (0.5 - rows))
    return isinstance(output, torch.Tensor) and torch.equal(output, expected)


# ---- Rotary positions ----

ROTARY = "apply_rotary_pos_emb"
"""Function in every module of transformers with rotary positions: (q, k, cos, sin) -> (q, k), q and k [batch, heads, positions,
size]."""


class _Rotary:
    """Replaces the rotary function in a module of transformers, where attention looks it up by name. It calls the kernel within
    layers that `_rotated` computes, and the original function elsewhere, for other models of the process."""

    def __init__(self, function: Function):
        self.original = function
        self._within = threading.local()  # backward passes recompute in threads of their own

    def __call__(self, *states: Any, **keywords: Any) -> Any:
        kernel = getattr(self._within, "kernel", None) or self.original
        return kernel(*states, **keywords)

    def computing(self, kernel: Function, forward: Function, *arguments: Any, **keywords: Any) -> Any:
        kernel_before, self._within.kernel = getattr(self._within, "kernel", None), kernel
        try:
            return forward(*arguments, **keywords)
        finally:
            self._within.kernel = kernel_before


def _take_over_rotary(module: nn.Module) -> list[str]:
    problems, kernel_by_key = [], {}
    for layer in module.modules():
        code = sys.modules[type(layer).__module__]
        rotary: Any = getattr(code, ROTARY, None)
        size = getattr(layer, "head_dim", None)
        if rotary is None or not isinstance(size, int) or not hasattr(layer, "q_proj"):
            continue
        replacement = rotary if isinstance(rotary, _Rotary) else _Rotary(rotary)
        dtype = _dtype_of(layer)
        key = code.__name__, size, dtype
        if key not in kernel_by_key:
            random = _seeded()
            states = [torch.randn(1, 64, heads, size, generator=random).transpose(1, 2) for heads in (4, 2)]
            angles = torch.randn(1, 64, size // 2, generator=random).repeat(1, 1, 2)
            kernel_by_key[key] = compiled_if_as_exact(replacement.original, states, (angles.cos(), angles.sin()), dtype)
        kernel, problem = kernel_by_key[key]
        if kernel is not None:
            setattr(code, ROTARY, replacement)
            layer.forward = partial(_rotated, replacement, kernel, layer.forward)
        problems.append(problem)
    return problems


def _rotated(replacement: _Rotary, kernel: Function, forward: Function, *arguments: Any, **keywords: Any) -> Any:
    return replacement.computing(kernel, forward, *arguments, **keywords)


# ---- The proof ----


def compiled_if_as_exact(
    function: Function, states: Sequence[torch.Tensor], constants: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[Function | None, str]:
    """Compile `function`; return it, or None and the reason: it does not compile here, or its error against fp64 is larger than
    that of `function`. states: inputs with gradients."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    device = accelerator.current()

    def results(compute: Function, kind: torch.dtype, where: torch.device) -> list[torch.Tensor]:
        rounded = [[tensor.to(dtype).to(where, kind) for tensor in part] for part in (states, constants)]
        inputs = [tensor.detach().requires_grad_() for tensor in rounded[0]]
        with torch.enable_grad():
            outputs = compute(*inputs, *rounded[1])
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            incoming = [torch.randn(tensor.shape, generator=_seeded()).to(dtype).to(where, kind) for tensor in outputs]
            gradients = torch.autograd.grad(outputs, inputs, incoming)
        return [tensor.detach().cpu().double() for tensor in (*outputs, *gradients)]

    try:
        exact, plain = results(function, torch.float64, torch.device("cpu")), results(function, dtype, device)
    except Exception as error:
        return None, f"it takes other tensors than known ones ({with_class(error)[:200]})"
    try:
        # fullgraph: otherwise torch silently leaves uncompiled what it cannot compile.
        kernel = accelerator.compiled(function, dynamic=True, fullgraph=True)
        fused = results(kernel, dtype, device)
    except Exception as error:
        return None, f"it does not compile here ({with_class(error)[:200]})"
    for true, plain_result, fused_result in zip(exact, plain, fused, strict=True):
        plain_error, fused_error = (
            float((result - true).norm() / true.norm()) for result in (plain_result, fused_result)
        )
        if not fused_error <= CLOSE * plain_error:
            return (
                None,
                f"its compiled form is less exact here (error {fused_error:.1e}, of the model's own {plain_error:.1e})",
            )
    return kernel, ""


def _dtype_of(layer: nn.Module) -> torch.dtype:
    """Return the dtype of the layer's first floating-point weight (quantized weights are integers); fp32 if it has none."""
    kinds = (weight.dtype for weight in layer.parameters())
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
