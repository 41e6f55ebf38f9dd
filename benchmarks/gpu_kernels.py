"""Cases of `gpu_report.py`: single operations in each of the ways that there are, with their time, memory and error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu_bench import Bench, case


@case
def attention(bench: Bench) -> None:
    """Time a forward and backward pass of packed rows by each kernel, and by sdpa with a mask."""
    import torch
    import torch.nn.functional as functional

    from dstune.models.varlen import boundaries_of, kernels

    for length in (bench.size(1024, 32), bench.size(4096, 64), bench.size(8192, 64)):
        sample = length // 4
        positions = (torch.arange(length) % sample)[None]
        starts, longest = boundaries_of({"input_ids": positions, "position_ids": positions})
        boundaries = (starts.to(bench.device), longest)
        heads, of_keys, size = bench.size(32, 4), bench.size(8, 2), bench.size(128, 16)
        shapes = ((length, heads, size), (length, of_keys, size), (length, of_keys, size))
        states = [torch.randn(shape).to(bench.device, torch.bfloat16).requires_grad_() for shape in shapes]
        place = torch.arange(length)
        seen = (place[:, None] >= place) & (place[:, None] // sample == place // sample)
        mask = seen[None, None].to(bench.device)

        def with_mask(mask: Any = mask, states: Any = states, groups: int = heads // of_keys) -> torch.Tensor:
            q, k, v = (part.transpose(0, 1)[None] for part in states)
            # As transformers does where there is a mask: fused kernels take no grouped heads with one.
            k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

        ways: dict[str, Callable[[], torch.Tensor]] = {"sdpa with a mask": with_mask}
        for kernel in kernels():
            if bench.simulate and "flex" in kernel.name:
                continue  # it is compiled

            def packed(kernel: Any = kernel, states: Any = states, at: Any = boundaries) -> torch.Tensor:
                from dstune.models.varlen import Boundaries

                return kernel.compute(*states, Boundaries(*at), states[0].shape[-1] ** -0.5, None)

            ways[kernel.name] = packed
        expected = with_mask().detach().float()
        for name, way in ways.items():
            try:
                apart = float((way().detach().float() - expected).abs().max())
                taken = bench.milliseconds(lambda way=way: way().float().square().sum().backward())
                peak = bench.peak_gib(lambda way=way: way().float().square().sum().backward())
                bench.row(positions=length, kernel=name, ms=taken, peak_gib=peak, apart=apart)
            except Exception as error:
                bench.row(positions=length, kernel=name, failed=f"{type(error).__name__}: {error}"[:200])


@case
def cross_entropy(bench: Bench) -> None:
    """Time the loss of 4,096 targets: chunks, the plain way, Liger's where it is installed."""
    import torch
    import torch.nn.functional as functional
    from torch import nn

    from dstune.models.cross_entropy import projected_cross_entropy, supports_fp32_products

    targets, vocabulary, width = bench.size(4096, 16), bench.size(128256, 64), bench.size(4096, 32)
    projection = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16).to(bench.device)
    hidden = torch.randn(targets, width).to(bench.device, torch.bfloat16).requires_grad_()
    expected = torch.randint(vocabulary, (targets,)).to(bench.device)
    bench.row(logits="fp32" if supports_fp32_products(bench.device.type, torch.bfloat16) else "bf16")

    def chunked() -> torch.Tensor:
        return projected_cross_entropy(projection, projection.forward, hidden, expected).loss_sum

    def plain() -> torch.Tensor:
        return functional.cross_entropy(projection(hidden).float(), expected, reduction="sum")

    ways = {"chunks": chunked, "plain": plain}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger"] = lambda: fused(projection.weight, hidden, expected)
    except ImportError:
        bench.row(way="Liger", failed="not installed")
    exact = functional.cross_entropy(hidden.detach().float() @ projection.weight.detach().float().t(), expected)
    for name, way in ways.items():
        peak = bench.peak_gib(lambda way=way: way().backward())
        apart = abs(float(way()) / targets - float(exact))
        bench.row(way=name, ms=bench.milliseconds(lambda way=way: way().backward()), peak_gib=peak, apart=apart)


@case
def norms(bench: Bench) -> None:
    """Time RMS norms of a Llama: transformers' chain, dstune's, torch's kernel; and whether the proof takes it."""
    import torch
    import torch.nn.functional as functional
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from dstune.models.norms import Kind, is_as_exact, lean_norm

    width = bench.size(4096, 32)
    rows = torch.randn(bench.size(8192, 16), width).to(bench.device, torch.bfloat16).requires_grad_()
    norm = LlamaRMSNorm(width, eps=1e-5).to(bench.device, torch.bfloat16)
    weight = norm.weight
    bench.row(kernel_is_as_exact=is_as_exact(Kind.rounded, 1e-5, width, torch.bfloat16))
    ways = {
        "transformers": lambda: norm(rows),
        "dstune": lambda: lean_norm(rows, weight, 1e-5, Kind.rounded),
        "torch's kernel": lambda: functional.rms_norm(rows, (width,), weight, 1e-5),
    }
    for name, way in ways.items():
        peak = bench.peak_gib(lambda way=way: way().sum().backward())
        bench.row(way=name, ms=bench.milliseconds(lambda way=way: way().sum().backward()), peak_gib=peak)


@case
def elementwise(bench: Bench) -> None:
    """Time SwiGLU and rotary positions as transformers has them and compiled, with what the proof says; SwiGLU by Liger where
    installed."""
    import torch
    import torch.nn.functional as functional
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from dstune.models.compiled import compiled_if_as_exact

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(bench.device, torch.bfloat16).requires_grad_()

    def swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.silu(a) * b

    positions, inner, size = bench.size(8192, 16), bench.size(14336, 32), bench.size(128, 16)
    gate, up = random(positions, inner), random(positions, inner)
    query, key = (random(1, positions, bench.size(heads, 2), size).transpose(1, 2) for heads in (32, 8))
    angles = torch.rand(1, positions, size // 2).repeat(1, 1, 2).to(bench.device)
    turns = angles.cos().bfloat16(), angles.sin().bfloat16()

    def rotary(compute: Callable[..., Any]) -> Callable[[], torch.Tensor]:
        return lambda: torch.cat([part.flatten() for part in compute(query, key, *turns)])

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "SwiGLU": lambda: swiglu(gate, up),
        "rotary": rotary(apply_rotary_pos_emb),
    }
    if not bench.simulate:
        small = [torch.randn(64, inner) for _ in range(2)]
        of_gate, problem = compiled_if_as_exact(swiglu, small, (), torch.bfloat16)
        bench.row(way="SwiGLU compiled", taken=of_gate is not None, problem=problem)
        if of_gate is not None:
            ways["SwiGLU compiled"] = lambda: of_gate(gate, up)
        states = [torch.randn(1, 64, heads, size).transpose(1, 2) for heads in (4, 2)]
        few = [one[:, :64].float().cpu() for one in turns]
        of_rotary, problem = compiled_if_as_exact(apply_rotary_pos_emb, states, few, torch.bfloat16)
        bench.row(way="rotary compiled", taken=of_rotary is not None, problem=problem)
        if of_rotary is not None:
            ways["rotary compiled"] = rotary(of_rotary)
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        ways["SwiGLU by Liger"] = lambda: LigerSiLUMulFunction.apply(gate, up)
    except ImportError:
        bench.row(way="SwiGLU by Liger", failed="not installed")
    for name, way in ways.items():
        peak = bench.peak_gib(lambda way=way: way().sum().backward())
        bench.row(way=name, ms=bench.milliseconds(lambda way=way: way().sum().backward()), peak_gib=peak)
