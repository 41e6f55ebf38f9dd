"""Attention of packed rows in one kernel: which is chosen, what it is told, and that a model learns what it learns with masks."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as functional
from support.tiny import save_decoder

from dstune.config.compose import compose
from dstune.models import varlen
from dstune.models.heads.language import LONGEST, STARTS, CausalLmHead
from dstune.models.varlen import Boundaries, Kernel, PackedAttention, boundaries_of
from dstune.zero import accelerator
from tests.unit.test_attention import batches, load, set_up_rank


def looped(query, key, value, boundaries, scale, window):
    """What a kernel computes, sample by sample."""
    output = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype)
    starts = boundaries.starts.tolist()
    assert max(end - start for start, end in pairwise(starts)) <= boundaries.longest
    for start, end in pairwise(starts):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        behind = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (behind >= 0) & (behind < (window or end))
        output[start:end] = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
        ).transpose(0, 1)
    return output


LOOP = Kernel("a loop", looped)


def test_where_samples_begin():
    ids = torch.zeros(2, 6, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    starts, longest = boundaries_of({"input_ids": ids, "position_ids": positions})
    assert starts.tolist() == [0, 3, 5, 6, 12] and longest == 6 and starts.dtype is torch.int32
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    starts, longest = boundaries_of({"input_ids": ids, "attention_mask": mask})
    assert starts.tolist() == [0, 4, 6, 12] and longest == 6


@pytest.mark.parametrize("name", ["packed", "padded"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_model_learns_what_it_learns_with_masks(tmp_path, name, indexed):
    """With boundaries and targets that the loader has found, and with those that the head finds."""
    batch = batches()[name]
    save_decoder(tmp_path)
    found = []
    for packed in (False, True):
        model = load(tmp_path)
        head = CausalLmHead(model, PackedAttention(model, LOOP) if packed else None)
        given = head.indexed(batch) if indexed else batch
        assert (STARTS in given and LONGEST in given) == (indexed and packed)
        loss = head(model, given).loss_sum
        loss.backward()
        found.append((loss.detach(), {key: value.grad for key, value in model.named_parameters()}))
    (expected, of_masks), (loss, gradients) = found
    torch.testing.assert_close(loss, expected)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_masks[key], atol=2e-5, rtol=1e-4, msg=key)


def crossing(query, key, value, boundaries, scale, window):
    starts = torch.stack([boundaries.starts[0], boundaries.starts[-1]])
    return looped(query, key, value, Boundaries(starts, len(query)), scale, window)


def test_a_kernel_that_lets_samples_see_each_other_is_given_up(tmp_path):
    model = load(save_decoder(tmp_path))
    report, head = set_up_rank(model, PackedAttention(model, LOOP))
    assert report == [] and head.rows is not None
    model = load(tmp_path)
    report, head = set_up_rank(model, PackedAttention(model, Kernel("a crossing", crossing)))
    assert head.rows is None and model.config._attn_implementation == "sdpa"
    assert report[0].startswith(
        "model.attention=auto: sdpa, since rows have other logits than their samples alone by a cr"
    )


def recording_kernel(known: list[str], output=None):
    """A function with these arguments, and what it was called with."""
    calls = []

    def compute(*args, **kwargs):
        assert set(kwargs) <= set(known)
        calls.append((args, kwargs))
        return args[0] if output is None else output

    import inspect

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in known]
    compute.__signature__ = inspect.Signature(parameters)
    return compute, calls


STATES = [torch.randn(12, heads, 8) for heads in (4, 2, 2)]
BOUNDARIES = Boundaries(torch.tensor([0, 5, 12], dtype=torch.int32), 7)


def test_torchs_kernel_is_told_by_what_its_signature_has(monkeypatch):
    module = ModuleType("torch.nn.attention.varlen")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    module.varlen_attn, calls = recording_kernel(["scale", "window_size", "enable_gqa"])
    varlen.torch_varlen().compute(*STATES, BOUNDARIES, 0.7, 4)
    ((given, more),) = calls
    assert [tuple(state.shape) for state in given[:3]] == [(12, 4, 8), (12, 2, 8), (12, 2, 8)]
    assert given[5:] == (7, 7) and more == {"scale": 0.7, "window_size": (3, 0), "enable_gqa": True}
    module.varlen_attn, calls = recording_kernel(["is_causal"])  # as in torch 2.10
    varlen.torch_varlen().compute(*STATES, BOUNDARIES, 0.7, None)
    ((given, more),) = calls
    assert torch.allclose(given[0], STATES[0] * 0.7 * 8**0.5) and given[1].shape == (12, 4, 8)
    assert more == {"is_causal": True}
    with pytest.raises(varlen.UserError, match="no sliding window"):
        varlen.torch_varlen().compute(*STATES, BOUNDARIES, 0.7, 4)
    del module.varlen_attn
    assert varlen.torch_varlen() is None


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((9, 0), ["flash_attn", "flash_attn_interface"], "flash-attn 3"),
        ((8, 0), ["flash_attn", "flash_attn_interface"], "flash-attn 2"),
        ((10, 0), ["flash_attn", "flash_attn.cute"], "flash-attn 4"),
        ((9, 0), [], None),
    ],
)
def test_flash_attn_by_what_is_installed_and_the_device(monkeypatch, capability, installed, chosen):
    monkeypatch.setattr(accelerator, "capability", lambda: capability)
    for _, name in varlen.FLASH:
        module = ModuleType(name)
        if name in installed:
            known = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "softmax_scale", "causal", "window_size"]
            module.flash_attn_varlen_func, _ = recording_kernel(
                [*known, "deterministic"] if name == "flash_attn" else known
            )
        monkeypatch.setitem(sys.modules, name, module if name in installed else None)
    found = varlen.flash_attn()
    assert (found and found.name) == chosen
    if found:
        found.compute(*STATES, BOUNDARIES, 0.7, None)


def test_flex_computes_the_same():
    kernel = varlen.flex()
    for window in (None, 3):
        expected = looped(*STATES, BOUNDARIES, 0.7, window)
        torch.testing.assert_close(kernel.compute(*STATES, BOUNDARIES, 0.7, window), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "dtype", "capability", "chosen"),
    [
        ([], torch.bfloat16, (9, 0), "torch"),
        (["data.packing=false"], torch.bfloat16, (9, 0), "torch"),
        (["model.attention=flash_attention_2"], torch.bfloat16, (8, 0), "torch"),
        ([], torch.float16, (7, 5), "flex"),
        ([], torch.float32, (9, 0), None),
        (["model.attention=sdpa"], torch.bfloat16, (9, 0), None),
        (["method=prefix"], torch.bfloat16, (9, 0), None),
        (["model.config_overrides={attention_dropout: 0.1}"], torch.bfloat16, (9, 0), None),
    ],
)
def test_runs_whose_rows_go_through_one_kernel(tmp_path, monkeypatch, overrides, dtype, capability, chosen):
    monkeypatch.setattr(accelerator, "present", lambda: True)
    monkeypatch.setattr(accelerator, "capability", lambda: capability)
    monkeypatch.setattr(torch, "compile", lambda function, **unused: function)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    config = compose(["model=smollm2", "data=chitchat", *overrides]).config
    model = load(save_decoder(tmp_path)).to(dtype)
    model.config.update(config.model.config_overrides)
    found = PackedAttention.of(config, model)
    assert (found.kernel.name.split()[0] if found else None) == chosen
    assert model.config._attn_implementation == (PackedAttention.NAME if chosen else "sdpa")


def test_heads_of_any_size_and_values_of_another(tmp_path):
    model = load(save_decoder(tmp_path))
    sizes = []

    def seen(query, key, value, *more):
        sizes.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return looped(query, key, value, *more)

    packed = PackedAttention(model, Kernel("a loop", seen))
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 12), torch.randn(2, 2, 6, 12), torch.randn(2, 2, 6, 9)
    boundaries = Boundaries(torch.tensor([0, 4, 6, 12], dtype=torch.int32), 6)
    found = packed.attend(query, key, value, boundaries, dropout=0.0, scale=0.3, window=None)
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    expected = looped(*flat, boundaries, 0.3, None).view(2, 6, 4, 9).transpose(1, 2)
    assert sizes == [(16, 16, 16)]
    torch.testing.assert_close(found, expected)
