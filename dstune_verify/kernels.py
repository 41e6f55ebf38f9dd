"""Attention and fused kernels that are installed, against their definition in plain torch.

Each check computes outputs and gradients in the precision of the kernel, and in float64 by the definition. The kernel may be as far
from it as the same definition in the kernel's precision, times ALLOWANCE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from dstune_verify.cases import CannotRun, CheckCase, installed
from dstune_verify.models import hashed
from dstune_verify.world import World

ALLOWANCE = 4.0
LEAST = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.004}
"""Relative error that is always allowed."""
HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
"""The head sizes of published models; kernels have code of their own for each."""
LENGTHS = (1, 7, 128, 131)
REFUSALS = ("No available kernel", "No viable backend", "not support")
"""How torch says that a kernel does not take an input."""
Figures = tuple[str, dict[str, float], dict[str, float]]
Tensors = Sequence[torch.Tensor]


def numbers(shape: Sequence[int], seed: str) -> torch.Tensor:
    """Return float64 numbers in [-1, 1) from the formula, in this shape."""
    return hashed(math.prod(shape), seed).reshape(tuple(shape))


def distance(result: Tensors, exact: Tensors) -> float:
    """Return the largest relative error among tensors that belong together. NaN is infinite."""
    least = 0.03 * max(float(want.norm()) for want in exact)  # a gradient that is zero has no relative error
    errors = [
        float((got.double() - want).norm() / want.norm().clamp_min(least))
        for got, want in zip(result, exact, strict=True)
    ]
    return max((error if error == error else math.inf) for error in errors)


def with_gradients(
    function: Callable[..., torch.Tensor], inputs: Tensors, upstream: torch.Tensor
) -> list[torch.Tensor]:
    """Return the output and the gradient of each input, given the gradient of the output."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


class Comparison:
    """Collects the errors of a kernel over many inputs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.wrong: list[str] = []
        self.worst, self.tried = 0.0, 0

    def add(
        self,
        what: str,
        kernel: Callable[..., torch.Tensor],
        definition: Callable[..., torch.Tensor],
        inputs: Tensors,
        dtype: torch.dtype,
    ) -> None:
        """Compare a kernel with its definition. inputs: in float64, on the CPU."""
        moved = [tensor.to(self.device) for tensor in inputs]
        with torch.no_grad():
            upstream = numbers(definition(*inputs).shape, "upstream").to(self.device)
        exact = with_gradients(definition, moved, upstream)
        plain = with_gradients(definition, [tensor.to(dtype) for tensor in moved], upstream)
        result = with_gradients(kernel, [tensor.to(dtype) for tensor in moved], upstream)
        self.tried += 1
        error, bound = distance(result, exact), max(LEAST[dtype], ALLOWANCE * distance(plain, exact))
        self.worst = max(self.worst, error / bound)
        if not error <= bound:
            self.wrong.append(f"{what}: relative error {error:.3g}, bound {bound:.3g}")

    def figures(self) -> Figures:
        if not self.tried:
            raise CannotRun("no kernel of this kind takes this device")
        return "; ".join(self.wrong[:3]), {"error beside its bound": self.worst}, {"error beside its bound": 1.0}


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None
) -> torch.Tensor:
    """Attention by its definition. query: [rows, heads, length, size]; allowed: [length, length] or None for all."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value


def causal(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def packed(length: int, device: torch.device) -> torch.Tensor:
    """Two samples in one row: causal, and no position sees the other sample."""
    sample = (torch.arange(length, device=device) >= length // 3).long()
    return causal(length, device) & (sample[:, None] == sample[None, :])


def precisions(device: torch.device) -> Iterator[torch.dtype]:
    yield torch.float32
    if device.type == "cpu":
        yield torch.bfloat16
        return
    if device.type != "cuda" or torch.cuda.is_bf16_supported():
        yield torch.bfloat16
    yield torch.float16


def sdpa_backends() -> dict[str, Any]:
    """Return the kernels of torch's scaled_dot_product_attention by name."""
    from torch.nn.attention import SDPBackend

    names = {
        "math": "MATH",
        "flash": "FLASH_ATTENTION",
        "memory-efficient": "EFFICIENT_ATTENTION",
        "cudnn": "CUDNN_ATTENTION",
    }
    return {name: getattr(SDPBackend, attribute) for name, attribute in names.items() if hasattr(SDPBackend, attribute)}


def check_sdpa(backend: str, world: World) -> Figures:
    """Compare a kernel of torch's attention: head sizes, lengths, grouped heads, masks."""
    from torch.nn.attention import sdpa_kernel

    chosen = sdpa_backends()[backend]
    comparison = Comparison(world.device)
    for dtype in precisions(world.device):
        for size in HEAD_SIZES:
            for length in LENGTHS:
                if size > 96 and length == 131:
                    continue
                for mask in ("causal", "packed", "none") if length > 1 else ("none",):
                    inputs = attention_inputs(size, length, heads=2, key_heads=2)
                    kernel, definition = _sdpa(mask)

                    def run(*tensors: torch.Tensor, kernel: Any = kernel) -> torch.Tensor:
                        with sdpa_kernel(chosen):
                            return kernel(*tensors)

                    try:
                        what = f"head size {size}, {length} positions, mask {mask}, {str(dtype).removeprefix('torch.')}"
                        comparison.add(what, run, definition, inputs, dtype)
                    except RuntimeError as error:
                        if not any(words in str(error) for words in REFUSALS):
                            raise
    return comparison.figures()


def attention_inputs(size: int, length: int, *, heads: int, key_heads: int) -> list[torch.Tensor]:
    """Return query, key and value in float64. Scores vary by about one."""
    query = numbers((2, heads, length, size), "query") * 3
    key, value = numbers((2, key_heads, length, size), "key"), numbers((2, key_heads, length, size), "value")
    return [query, key, value]


def _sdpa(mask: str) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    def allowed(query: torch.Tensor) -> torch.Tensor | None:
        length = query.shape[2]
        return {"causal": causal(length, query.device), "packed": packed(length, query.device), "none": None}[mask]

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if mask == "packed":
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed(query))
        return functional.scaled_dot_product_attention(query, key, value, is_causal=mask == "causal")

    return kernel, lambda query, key, value: attention(query, key, value, allowed(query))


def check_flash_attn(world: World) -> Figures:
    """Compare the package flash-attn, with grouped heads."""
    if world.device.type != "cuda":
        raise CannotRun("flash-attn needs a GPU")
    from flash_attn import flash_attn_func

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return flash_attn_func(*turned, causal=True).transpose(1, 2)

    comparison = Comparison(world.device)
    for dtype in (torch.bfloat16, torch.float16):
        for size in HEAD_SIZES:
            for length in LENGTHS:
                inputs = attention_inputs(size, length, heads=4, key_heads=2)
                definition = _sdpa("causal" if length > 1 else "none")[1]
                comparison.add(f"head size {size}, {length} positions, {dtype}", kernel, definition, inputs, dtype)
    return comparison.figures()


def check_norms_and_losses(world: World) -> Figures:
    """Compare torch's fused layer norm, RMS norm, cross entropy and activations with their definitions."""
    comparison = Comparison(world.device)
    for dtype in precisions(world.device):
        name = str(dtype).removeprefix("torch.")
        for width in (24, 129, 1024):
            hidden, scale, shift = (
                numbers((5, width), "hidden") * 2,
                1 + numbers((width,), "scale") / 4,
                numbers((width,), "shift"),
            )
            comparison.add(
                f"layer_norm of {width}, {name}",
                lambda x, w, b: functional.layer_norm(x, (x.shape[-1],), w, b),
                lambda x, w, b: (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt() * w + b,
                [hidden, scale, shift],
                dtype,
            )
            if hasattr(functional, "rms_norm"):
                comparison.add(
                    f"rms_norm of {width}, {name}",
                    lambda x, w: functional.rms_norm(x, (x.shape[-1],), w, 1e-6),
                    lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w,
                    [hidden, scale],
                    dtype,
                )
        logits = numbers((6, 503), "logits") * 4
        comparison.add(
            f"cross_entropy, {name}",
            lambda x: functional.cross_entropy(x.float() if x.dtype != torch.float64 else x, _targets(x)),
            _cross_entropy,
            [logits],
            dtype,
        )
        for label, kernel, definition in (
            ("gelu", functional.gelu, lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
            ("silu", functional.silu, lambda x: x / (1 + torch.exp(-x))),
        ):
            comparison.add(f"{label}, {name}", kernel, definition, [numbers((7, 257), label) * 4], dtype)
    return comparison.figures()


def _targets(logits: torch.Tensor) -> torch.Tensor:
    """Return a target for each of six rows, one of which does not count."""
    return torch.tensor([0, 502, 17, -100, 251, 3], device=logits.device)


def _cross_entropy(logits: torch.Tensor) -> torch.Tensor:
    wide, targets = logits if logits.dtype == torch.float64 else logits.float(), _targets(logits)
    chosen = targets >= 0
    shifted = wide[chosen] - wide[chosen].amax(-1, keepdim=True).detach()
    logs = shifted - shifted.exp().sum(-1, keepdim=True).log()
    return -logs.gather(-1, targets[chosen][:, None]).mean()


def check_liger(world: World) -> Figures:
    """Compare Liger's RMS norm, SwiGLU and cross entropy, which need Triton and a GPU."""
    if world.device.type == "cpu":
        raise CannotRun("Liger's kernels need a GPU")
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_rms_norm, liger_swiglu

    comparison = Comparison(world.device)
    for dtype in precisions(world.device):
        for width in (128, 1024, 4096):
            hidden, scale = numbers((5, width), "hidden") * 2, 1 + numbers((width,), "scale") / 4
            comparison.add(
                f"Liger's rms_norm of {width}, {dtype}",
                lambda x, w: liger_rms_norm(x, w, 1e-6),
                lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w,
                [hidden, scale],
                dtype,
            )
            gate, up = numbers((5, width), "gate") * 3, numbers((5, width), "up")
            comparison.add(
                f"Liger's swiglu of {width}, {dtype}",
                liger_swiglu,
                lambda a, b: a * torch.sigmoid(a) * b,
                [gate, up],
                dtype,
            )
        comparison.add(
            f"Liger's cross_entropy, {dtype}",
            lambda x: liger_cross_entropy(x, _targets(x)),
            _cross_entropy,
            [numbers((6, 503), "logits") * 4],
            dtype,
        )
    return comparison.figures()


def _needs(package: str, name: str) -> Callable[[str], str]:
    return lambda device: "" if installed(package) else f"{name} is not installed"


CASES = (
    *(
        CheckCase(f"attention-sdpa-{backend}", "torch", partial(check_sdpa, backend))
        for backend in ("math", "flash", "memory-efficient", "cudnn")
    ),
    CheckCase("attention-flash-attn", "torch", check_flash_attn, _needs("flash_attn", "flash-attn")),
    CheckCase("fused-norms-losses-activations", "torch", check_norms_and_losses),
    CheckCase("fused-liger", "torch", check_liger, _needs("liger_kernel", "Liger")),
)
