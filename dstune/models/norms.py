"""Root mean square norms (Zhang and Sennrich 2019, arXiv:1910.07467) that keep little more than their input for the backward pass.

transformers computes them by a chain of operations, for which autograd keeps the input in fp32 and the normed input: 6 bytes for
an element in bf16. 2 bytes are enough, since everything follows from the input and one number for each row. Rows are computed
in blocks that stay in a CPU's cache: a forward and backward pass of 1,024 rows of 576 in bf16 took 3.8 ms on one core instead
of 7.3 ms (`benchmarks/norms.py`). The output equals that of the chain to the bit.

On an accelerator, torch has one kernel for the norm (`torch.nn.functional.rms_norm`). It rounds once where Llama's chain rounds
twice, so a quarter of the entries have other bits. It is used in half precision if a test on the device finds it no further from
fp64 than the model's own norm (`model.fused_norms`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from torch.func import functional_call

from dstune.zero import accelerator
from dstune.zero.parts import full_shape

BLOCK_ELEMENTS = 2**17
"""Elements of a block on a CPU. Of 2**14 to 2**20, 2**16 to 2**18 were equally fast; the longest took twice as long."""


class Kind(Enum):
    """What happens to the normed input, which is in fp32."""

    rounded = "rounded"
    """It is rounded to the input's format, then multiplied by the weight: Llama, Mistral, Qwen, SmolLM, T5."""
    scaled = "scaled"
    """It is multiplied by the weight, then rounded: OLMo 2."""
    shifted = "shifted"
    """It is multiplied by 1 + weight in fp32, then rounded: Gemma."""


def use_lean_norms(module: nn.Module, *, fused: bool = False) -> int:
    """Replace the forward of every norm in `module` that is of a `Kind`; return the number of replaced norms. fused: use torch's
    kernel if it is exact enough.

    A norm is recognized by its results: it is replaced only if its output on random rows equals that of a kind to the bit. Call
    this before DeepSpeed installs hooks on the modules, and after peft has copied the modules that it trains beside adapters.
    """
    count = 0
    kinds: dict[Any, Kind | None] = {}
    for norm in module.modules():
        epsilon = _epsilon(norm)
        if epsilon is None:
            continue
        weight: Any = norm.weight
        key = type(norm), epsilon, full_shape(weight), weight.dtype
        if key not in kinds:
            kinds[key] = _kind(norm, epsilon)
        kind = kinds[key]
        if kind is not None:
            kernel = fused and accelerator.present() and is_as_exact(kind, epsilon, *key[2], weight.dtype)
            norm.forward = partial(_forward, norm, epsilon, kind, kernel)
            count += 1
    return count


def _epsilon(module: nn.Module) -> float | None:
    """Return the epsilon that a norm of transformers adds to the mean square; None if the module does not look like such a norm."""
    parameters = dict(module.named_parameters())
    if len(inspect.signature(type(module).forward).parameters) != 2:  # a second input, such as an optional gate
        return None
    if type(module).__module__.startswith("torch.") or list(parameters) != ["weight"]:
        return None
    if len(full_shape(parameters["weight"])) != 1 or list(module.buffers()):
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) else None


def _kind(norm: nn.Module, epsilon: float) -> Kind | None:
    """Try all kinds of arithmetic; return the one whose results equal those of `norm` to the bit, or None."""
    generator = torch.Generator().manual_seed(0)
    norm_weight: Any = norm.weight
    dtype, (width,) = norm_weight.dtype, full_shape(norm_weight)
    weight = torch.randn(width, generator=generator).to(dtype)
    # Rows from very small ones, with a mean square below epsilon, to large ones.
    rows = torch.randn(16, width, generator=generator) * torch.logspace(-4, 2, 16)[:, None]
    rows = rows.to(dtype)
    with torch.no_grad():
        try:
            expected = functional_call(norm, {"weight": weight}, (rows,))
        except Exception:  # it takes something other than rows
            return None
        for kind in Kind:
            output = lean_norm(rows, weight, epsilon, kind)
            if isinstance(expected, torch.Tensor) and expected.dtype == output.dtype and torch.equal(expected, output):
                return kind
    return None


def norms_computed_here(module: nn.Module) -> tuple[int, int, set[Kind]]:
    """Return the number of norms that torch's kernel computes, the number computed in blocks, and the kinds of the latter."""
    forwards = [layer.forward for layer in module.modules() if isinstance(layer.forward, partial)]
    ours = [(forward.args[2], bool(forward.args[3])) for forward in forwards if forward.func is _forward]
    by_kernel = sum(kernel for _, kernel in ours)
    return by_kernel, len(ours) - by_kernel, {kind for kind, kernel in ours if not kernel}


NO_KERNEL = {Kind.shifted: "torch's kernel would round 1 + weight"}
"""Kinds that torch's kernel never computes, and why: it takes the factor in the input's format, and rounding 1 + weight to bf16
adds an error of up to 2**-9, as much as the rounding of the output."""
CLOSE = 1.05
"""Largest accepted ratio of the kernel's error to that of the model's norm: both are rounding errors."""


@cache
def is_as_exact(kind: Kind, epsilon: float, width: int, dtype: torch.dtype) -> bool:
    """Return whether torch's kernel on this accelerator is as close to fp64 as the model's norm (within `CLOSE`), in its output and
    both gradients."""
    if kind in NO_KERNEL or dtype not in (torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator().manual_seed(0)
    rows, incoming = (torch.randn(64, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)

    def errors(compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[float]:
        inputs = [part.to(accelerator.current()).requires_grad_() for part in (rows, weight)]
        with torch.enable_grad():
            output = compute(*inputs)
        tensors = (output, *torch.autograd.grad(output, inputs, incoming.to(accelerator.current())))
        return [
            float((tensor.detach().cpu().double() - true).norm())
            for tensor, true in zip(tensors, expected, strict=True)
        ]

    exact = [part.double().requires_grad_() for part in (rows, weight)]
    with torch.enable_grad():
        output = functional.rms_norm(exact[0], (width,), exact[1], epsilon)
    expected = (output.detach(), *torch.autograd.grad(output, exact, incoming.double()))
    lean_errors = errors(lambda some, by: lean_norm(some, by, epsilon, kind))
    kernel = errors(lambda some, by: functional.rms_norm(some, (width,), by, epsilon))
    return all(kernel_error <= CLOSE * lean_error for kernel_error, lean_error in zip(kernel, lean_errors, strict=True))


def _forward(norm: nn.Module, epsilon: float, kind: Kind, kernel: bool, hidden_states: torch.Tensor) -> torch.Tensor:
    weight: Any = norm.weight  # read at each call: ZeRO-3 and trials of other weights replace the tensor
    if kernel and hidden_states.dtype is weight.dtype and not hidden_states.is_cpu:
        return functional.rms_norm(hidden_states, weight.shape, weight, epsilon)
    return lean_norm(hidden_states, weight, epsilon, kind)


def lean_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: Kind) -> torch.Tensor:
    """Return `rows`, [..., width], normed over the last dimension and multiplied by the factor of `weight`, [width]."""
    if not torch.is_grad_enabled():  # in generation, the bookkeeping of autograd would take as long as the norm
        return _norm(rows, weight, epsilon, kind)[0]
    output: torch.Tensor = _LeanNorm.apply(rows, weight, epsilon, kind)
    return output


def _norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed rows, and 1 / root mean square of each row, fp32 [all rows, 1]."""
    flat = rows.reshape(-1, rows.shape[-1])
    rounded = kind is Kind.rounded
    output = torch.empty_like(flat, dtype=torch.promote_types(rows.dtype, weight.dtype) if rounded else rows.dtype)
    scales = torch.empty(len(flat), 1, dtype=torch.float32, device=rows.device)
    factor = _factor(weight, kind)
    for some, to, scale in _blocks(flat, output, scales):
        some = some.float()
        scale.copy_(torch.rsqrt(some.pow(2).mean(-1, keepdim=True) + epsilon))
        normed = some * scale
        if rounded:
            torch.mul(weight, normed.to(rows.dtype), out=to)
        else:
            to.copy_(normed.mul_(factor))
    return output.view_as(rows), scales


class _LeanNorm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: Kind) -> torch.Tensor:
        output, scales = _norm(rows, weight, epsilon, kind)
        context.save_for_backward(rows, weight, scales)
        context.kind = kind
        return output

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients. With x the normed row, w the factor and s the row's scale: the gradient of a row is s (g w - x
        mean(g w x)), that of the weight the sum of g x over the rows; all in fp32."""
        (gradient,) = gradients
        rows, weight, scales = context.saved_tensors
        of_rows, of_weight, *_ = context.needs_input_grad
        width = rows.shape[-1]
        flat, flat_gradient = rows.reshape(-1, width), gradient.reshape(-1, width)
        row_gradient = torch.empty_like(flat) if of_rows else flat
        weight_gradient = torch.zeros(width, dtype=torch.float32, device=rows.device)
        factor = _factor(weight, context.kind)
        for some, incoming, to, scale in _blocks(flat, flat_gradient, row_gradient, scales):
            normed = some.float() * scale
            incoming = incoming.float()
            product = incoming * normed
            if of_weight:
                weight_gradient += product.sum(0)
            if of_rows:
                shared = torch.mv(product, factor).div_(-width).unsqueeze(1)
                to.copy_((incoming * factor).addcmul_(normed, shared).mul_(scale))
        return (
            row_gradient.view_as(rows) if of_rows else None,
            weight_gradient.to(weight.dtype) if of_weight else None,
            None,
            None,
        )


def _factor(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return the factor of normed rows, fp32 [width]."""
    return 1.0 + weight.float() if kind is Kind.shifted else weight.float()


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same block of rows of all tensors, small enough for a CPU's cache; on an accelerator, all rows at once."""
    count = max(1, len(tensors[0]))
    if tensors[0].device.type == "cpu":
        count = max(1, BLOCK_ELEMENTS // tensors[0].shape[-1])
    if len(tensors[0]) <= count:
        return iter([tensors])
    return zip(*(tensor.split(count) for tensor in tensors), strict=True)
