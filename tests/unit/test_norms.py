"""Norms that keep their input alone: equal to those of transformers, in outputs to the bit, and as near to exact gradients."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dstune.models import kernels, norms
from dstune.models.norms import Kind, use_lean_norms
from dstune.zero import accelerator

WIDTH = 24
NORMS = {LlamaRMSNorm: Kind.rounded, T5LayerNorm: Kind.rounded, Olmo2RMSNorm: Kind.scaled, Gemma3RMSNorm: Kind.shifted}


def made(cls: Any, dtype: torch.dtype) -> Any:
    norm = cls(WIDTH, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))
    return norm


def passes(norm: Any, rows: torch.Tensor, incoming: torch.Tensor) -> tuple[torch.Tensor, ...]:
    norm.weight.grad = None
    rows = rows.clone().requires_grad_()
    output = norm(rows)
    output.backward(incoming.to(output.dtype))
    assert rows.grad is not None and norm.weight.grad is not None
    return output.detach(), rows.grad, norm.weight.grad


def exact(norm: Any, rows: torch.Tensor, incoming: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """By autograd in fp64 and by the definition, from the same weights and rows."""
    weight = norm.weight.detach().double().requires_grad_()
    rows = rows.double().requires_grad_()
    factor = 1 + weight if isinstance(norm, Gemma3RMSNorm) else weight
    output = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-5) * factor
    output.backward(incoming.double())
    assert rows.grad is not None and weight.grad is not None
    return output.detach(), rows.grad, weight.grad


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", NORMS)
@pytest.mark.parametrize("block", [2**17, 5 * WIDTH])
def test_output_is_that_of_transformers_and_gradients_are_as_exact(
    cls: Any, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(2)
    rows, incoming = (torch.randn(3, 7, WIDTH, generator=generator).to(dtype) for _ in range(2))
    theirs = made(cls, dtype)
    ours = copy.deepcopy(theirs)
    assert use_lean_norms(ours) == 1
    expected, found, truth = passes(theirs, rows, incoming), passes(ours, rows, incoming), exact(theirs, rows, incoming)
    assert torch.equal(found[0], expected[0])
    for mine, other, real in zip(found[1:], expected[1:], truth[1:], strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert error(mine, real) <= 1.1 * error(other, real) + 1e-7


@pytest.mark.parametrize(("cls", "kind"), NORMS.items())
def test_each_is_recognised_by_what_it_computes(cls: Any, kind: Kind) -> None:
    norm = made(cls, torch.bfloat16)
    assert norms._kind(norm, 1e-5) is kind
    assert norms._kind(norm, 1e-3) is None, "another epsilon was not noticed"


def test_what_computes_something_else_stays_as_it_is() -> None:
    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    class Pair(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * gate

    class Gated(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            normed: torch.Tensor = super().forward(hidden_states)
            return normed if gate is None else normed * gate

    kinds = [Gated, nn.LayerNorm, nn.RMSNorm, CohereLayerNorm, Doubled, Pair]
    model = nn.ModuleList([kind(WIDTH) for kind in kinds] + [nn.Linear(WIDTH, WIDTH, bias=False)])
    assert use_lean_norms(model) == 0
    assert not any("forward" in vars(module) for module in model)


def test_frozen_weight_or_rows_get_no_gradient() -> None:
    norm = made(LlamaRMSNorm, torch.float32)
    assert use_lean_norms(norm) == 1
    rows = torch.randn(4, WIDTH)
    norm(rows).sum().backward()
    assert norm.weight.grad is not None
    norm.weight.grad = None
    norm.weight.requires_grad_(False)
    rows.requires_grad_()
    norm(rows).sum().backward()
    assert rows.grad is not None and norm.weight.grad is None


def test_no_rows_give_a_gradient_of_zeros() -> None:
    norm = made(LlamaRMSNorm, torch.bfloat16)
    use_lean_norms(norm)
    norm(torch.zeros(0, WIDTH, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None and not norm.weight.grad.any()


def test_the_input_alone_is_kept() -> None:
    """transformers keeps it in fp32, and the normed input too: 6 bytes an element."""
    norm, rows = made(LlamaRMSNorm, torch.bfloat16), torch.randn(50, WIDTH).bfloat16().requires_grad_()

    def kept() -> float:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() >= rows.numel():
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            norm(rows)
        return sum(sizes) / rows.numel()

    assert kept() >= 6
    use_lean_norms(norm)
    assert kept() == 2


def test_a_norm_in_fp32_between_layers_in_bf16() -> None:
    norm = made(LlamaRMSNorm, torch.float32)
    rows = torch.randn(5, WIDTH).bfloat16()
    expected = norm(rows)
    assert use_lean_norms(norm) == 1
    assert expected.dtype is torch.float32 and torch.equal(norm(rows), expected)


@pytest.mark.parametrize("worse", [False, True])
def test_torchs_kernel_is_taken_where_it_is_no_further_from_fp64(worse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs on what stands for a device here; a kernel that loses precision is not taken."""
    monkeypatch.setattr(accelerator, "present", lambda: True)
    monkeypatch.setattr(accelerator, "current", lambda: torch.device("cpu"))
    norms.is_as_exact.cache_clear()
    kernel = functional.rms_norm

    def coarse(rows: torch.Tensor, *more: Any) -> torch.Tensor:
        output = kernel(rows, *more)
        return output if output.dtype is torch.float64 else output * 1.02

    monkeypatch.setattr(functional, "rms_norm", coarse if worse else kernel)
    norm = nn.Sequential(LlamaRMSNorm(64)).to(torch.bfloat16)
    assert norms.use_lean_norms(norm, fused=True) == 1
    assert norms.norms_computed_here(norm) == ((0, 1, {Kind.rounded}) if worse else (1, 0, set()))
    norms.is_as_exact.cache_clear()


def test_a_norm_that_no_kernel_computes_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "present", lambda: True)
    norm = nn.Sequential(Gemma3RMSNorm(64)).to(torch.bfloat16)
    assert norms.use_lean_norms(norm, fused=True) == 1
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    optimizer = torch.optim.AdamW(norm.parameters())
    assert norms.NO_KERNEL[Kind.shifted] in kernels.of_run(norm, model, None, optimizer)["norms"]
    llama = nn.Sequential(LlamaRMSNorm(64))
    assert norms.use_lean_norms(llama) == 1
    assert kernels.of_run(llama, model, None, optimizer)["norms"] == "blocks of rows"
