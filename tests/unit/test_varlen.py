"""Attention of packed rows in one kernel: which is chosen, what it is told, and that a model learns what it learns with masks."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from support.tiny import save_decoder, save_t5

from dstune.config.compose import compose
from dstune.models import packed_attention, varlen
from dstune.models.heads.language import LONGEST, STARTS, CausalLmHead
from dstune.models.load import load_model, load_tokenizer
from dstune.models.packed_attention import Heads, PackedAttention, choose
from dstune.models.varlen import Boundaries, Kernel, boundaries_of
from dstune.zero import accelerator
from tests.unit.test_attention import as_with_masks, batches, load, verified


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

    def loss_of(model, packed):
        head = CausalLmHead(model, PackedAttention(model, LOOP) if packed else None)
        given = head.indexed(batch) if indexed else batch
        assert (STARTS in given and LONGEST in given) == (indexed and packed)
        return head(model, given).loss_sum

    as_with_masks(tmp_path, loss_of)


def crossing(query, key, value, boundaries, scale, window):
    starts = torch.stack([boundaries.starts[0], boundaries.starts[-1]])
    return looped(query, key, value, Boundaries(starts, len(query)), scale, window)


def test_a_kernel_that_lets_samples_see_each_other_is_given_up(tmp_path):
    model = load(save_decoder(tmp_path))
    messages, head = verified(model, PackedAttention(model, LOOP))
    assert messages == [] and head.rows is not None
    model = load(tmp_path)
    messages, head = verified(model, PackedAttention(model, Kernel("a crossing", crossing)))
    assert head.rows is None and model.config._attn_implementation == "sdpa"
    assert messages[0].startswith(
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


def test_torchs_kernel_is_called_by_its_signature(monkeypatch):
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
    ("capability", "installed", "names"),
    [
        ((9, 0), ["flash_attn", "flash_attn_interface"], ["flash-attn 3", "torch", "flash-attn 2", "flex"]),
        ((9, 0), ["flash_attn.cute", "flash_attn_interface"], ["flash-attn 4", "flash-attn 3", "torch", "flex"]),
        ((8, 0), ["flash_attn", "flash_attn_interface", "flash_attn.cute"], ["torch", "flash-attn 2", "flex"]),
        ((10, 0), ["flash_attn", "flash_attn.cute"], ["flash-attn 4", "torch", "flash-attn 2", "flex"]),
        (None, ["flash_attn"], ["torch", "flash-attn 2", "flex"]),  # ROCm
        ((7, 5), [], ["torch", "flex"]),
    ],
)
def test_kernels_are_tried_newest_first(monkeypatch, capability, installed, names):
    monkeypatch.setattr(accelerator, "present", lambda: True)
    monkeypatch.setattr(accelerator, "capability", lambda: capability)
    monkeypatch.setattr(torch, "compile", lambda function, **unused: function)
    for name in varlen.FLASH_MODULES.values():
        module = ModuleType(name)
        if name in installed:
            known = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "softmax_scale", "causal", "window_size"]
            module.flash_attn_varlen_func, _ = recording_kernel(
                [*known, "deterministic"] if name == "flash_attn" else known
            )
        monkeypatch.setitem(sys.modules, name, module if name in installed else None)
    kernels = list(varlen.kernels())
    short = [name if name.startswith("flash-attn") else name.split()[0] for name in (one.name for one in kernels)]
    assert short == names
    for kernel in kernels:
        if kernel.name.startswith("flash-attn"):
            kernel.compute(*STATES, BOUNDARIES, 0.7, None)


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
        (["model.attention=flash_attention_2"], torch.bfloat16, (8, 0), "flash-attn"),
        ([], torch.bfloat16, None, "torch"),  # ROCm
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
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func, _ = recording_kernel(["cu_seqlens_q", "softmax_scale", "causal"])
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(packed_attention, "problem_of", lambda *unused: "")
    config = compose(["model=smollm2", "data=chitchat", *overrides]).config
    model = load(save_decoder(tmp_path)).to(dtype)
    model.config.update(config.model.config_overrides)
    found = PackedAttention.of(config, model, ranks(), pytest.fail)
    assert (found.kernel.name.split()[0] if found else None) == chosen
    assert model.config._attn_implementation == (PackedAttention.NAME if chosen else "sdpa")


def ranks(*others: str) -> Any:
    """What gathers, beside the value of this rank, those of others."""
    return SimpleNamespace(gather=lambda value: [value, *others])


def raising(*unused):
    raise RuntimeError("head dimension at most 256\nsomewhere")


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, states):
        return states.view_as(states)

    @staticmethod
    def backward(context, gradient):
        return gradient / 2


def wrong_backward(query, key, value, *more):
    return looped(query, HalfGradient.apply(key), value, *more)


def not_a_number(query, *more):
    return looped(query, *more) * float("nan")


def without_window(query, key, value, boundaries, scale, window):
    return looped(query, key, value, boundaries, scale, None)


HEADS = Heads(4, 2, (8, 16), window=True)


def test_a_kernel_is_taken_that_computes_the_model_s_heads_forward_and_backward():
    wrong = [Kernel(function.__name__, function) for function in (raising, crossing, wrong_backward, not_a_number)]
    kernel, given_up = choose([*wrong, Kernel("without a window", without_window), LOOP], HEADS, torch.bfloat16)
    assert kernel is LOOP
    assert given_up[0] == "raising: RuntimeError head dimension at most 256"
    assert [text.partition(":")[0] for text in given_up[1:4]] == ["crossing", "wrong_backward", "not_a_number"]
    assert all("differs by" in text for text in given_up[1:])
    without = Heads(4, 2, (8,))
    assert choose([Kernel("without a window", without_window)], without, torch.bfloat16)[0] is not None
    assert choose(wrong, HEADS, torch.bfloat16)[0] is None


def test_heads_are_those_of_the_model_s_layers(tmp_path):
    model = load(save_decoder(tmp_path))
    assert Heads.of(model, model.config) == Heads(4, 2, (8,))
    model.config.sliding_window = 16
    model.model.layers[1].self_attn.head_dim = 12
    assert Heads.of(model, model.config) == HEADS


@pytest.mark.parametrize(("others", "chosen"), [(["a loop"], True), (["flex attention"], False), ([""], False)])
def test_ranks_attend_by_one_kernel_or_by_none(tmp_path, monkeypatch, others, chosen):
    monkeypatch.setattr(accelerator, "present", lambda: True)
    monkeypatch.setattr(accelerator, "current", lambda: torch.device("cpu"))
    monkeypatch.setattr(varlen, "kernels", lambda: iter([Kernel("raising", raising), LOOP]))
    config = compose(["model=smollm2", "data=chitchat"]).config
    model = load(save_decoder(tmp_path)).to(torch.bfloat16)
    messages = []
    found = PackedAttention.of(config, model, ranks(*others), messages.append)
    assert (found is not None and found.title == "a loop") == chosen
    assert messages.pop(0) == "model.attention=auto: not by raising: RuntimeError head dimension at most 256"
    kinds = "a loop, flex attention" if others[0] else "a loop, none"
    assert chosen or messages == [f"model.attention=auto: by masks, since ranks have different kernels ({kinds})"]
    assert model.config._attn_implementation == (PackedAttention.NAME if chosen else "sdpa")


@pytest.mark.parametrize(("gpu", "reason"), [(False, "this machine has no GPU"), (True, "is not installed here")])
def test_flash_attention_that_is_not_there_is_refused_by_its_key(tmp_path, monkeypatch, gpu, reason):
    monkeypatch.setattr(accelerator, "present", lambda: gpu)
    model = save_decoder(tmp_path)
    config = compose([f"model.path={model}", "data=chitchat", "model.attention=flash_attention_2"]).config
    with pytest.raises(varlen.UserError) as error:
        load_model(config, load_tokenizer(config.model), (), torch.bfloat16)
    (problem,) = error.value.problems
    assert problem.where == "model.attention" and reason in problem.reason


def test_auto_loads_a_model_that_has_no_flash_attention_where_flash_attn_is_installed(tmp_path, monkeypatch):
    """T5 and DeBERTa have none in transformers, which refuses to load them with it."""
    model = save_t5(tmp_path / "t5")
    monkeypatch.setattr(accelerator, "present", lambda: True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("torch" if name == "flash_attn" else name))
    config = compose([f"model.path={model}", "task=seq2seq", "data=files", "data.train=rows.jsonl"]).config
    assert load_model(config, load_tokenizer(config.model), (), torch.bfloat16).config._attn_implementation == "sdpa"


def test_flash_attn_without_a_deterministic_backward_pass_is_not_taken_by_a_deterministic_run(monkeypatch):
    monkeypatch.setattr(accelerator, "present", lambda: True)
    monkeypatch.setattr(accelerator, "capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "compile", lambda function, **unused: function)
    for name in varlen.FLASH_MODULES.values():
        module = ModuleType(name)
        known = ["deterministic"] if name == "flash_attn" else []
        module.flash_attn_varlen_func, _ = recording_kernel([*known, "softmax_scale", "causal"])
        monkeypatch.setitem(sys.modules, name, module)
    assert [kernel.name for kernel in varlen.kernels()][:2] == ["flash-attn 4", "flash-attn 3"]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert [kernel.name for kernel in varlen.kernels() if "flash-attn" in kernel.name] == ["flash-attn 2"]


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
