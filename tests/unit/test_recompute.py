"""Selective activation checkpointing: the same gradients to the bit, no product of matrices twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dstune.config.compose import compose
from dstune.config.schema import Selective
from dstune.models import varlen
from dstune.models.norms import use_lean_norms
from dstune.models.recompute import SPREAD, checkpointing_options, policy

USUAL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
DECODER = USUAL | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4)),
    "experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=8)),
    "bert": (BertForSequenceClassification, BertConfig(**USUAL)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0),
    ),
}


class Counted(TorchDispatchMode):
    """How often each operation was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return self.calls["aten::mm"] + self.calls["aten::addmm"]


def passes(name: str, chosen: bool | Selective) -> tuple[float, dict[str, torch.Tensor], Counted]:
    """Loss and gradients of a model with dropout, and what both passes computed."""
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = model_class(config).train()
    use_lean_norms(model)
    if chosen:
        model.gradient_checkpointing_enable(checkpointing_options(chosen))
    rows = torch.randint(50, (2, 12))
    labels = torch.tensor([0, 1]) if name == "bert" else rows
    with Counted() as counted:
        torch.manual_seed(1)
        loss = model(input_ids=rows, labels=labels, **({} if name in ("bert", "t5") else {"use_cache": False})).loss
        loss.backward()
    return float(loss.detach()), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}, counted


@pytest.mark.parametrize("name", MODELS)
def test_the_same_to_the_bit_without_a_product_more(name: str) -> None:
    loss, gradients, plain = passes(name, False)
    found, others, selective = passes(name, Selective.selective)
    assert found == loss and others.keys() == gradients.keys()
    for key, gradient in gradients.items():
        # T5's products round as their tensors lie in memory, on some processors: 4e-7 of the largest was seen.
        apart = 1e-6 * float(gradient.abs().max()) if name == "t5" else 0.0
        torch.testing.assert_close(others[key], gradient, rtol=0.0, atol=apart, msg=key)
    assert selective.products == plain.products
    assert passes(name, True)[2].products > plain.products
    # Something is computed again, or nothing would be saved.
    assert selective.calls.total() > plain.calls.total()


def test_fused_attention_is_not_computed_again() -> None:
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    counts = [passes("llama", chosen)[2].calls[attention] for chosen in (False, Selective.selective, True)]
    assert counts == [2, 2, 4]


def test_what_a_low_rank_makes_is_computed_again() -> None:
    mm, addmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    positions, bias = torch.empty(5, 8), torch.empty(1)
    assert policy(None, mm, positions, torch.empty(8, 8 * SPREAD)) is CheckpointPolicy.MUST_SAVE
    assert policy(None, mm, positions, torch.empty(8, 8 * SPREAD + 1)) is CheckpointPolicy.PREFER_RECOMPUTE
    assert policy(None, addmm, bias, positions, torch.empty(8, 8 * SPREAD)) is CheckpointPolicy.MUST_SAVE
    assert policy(None, addmm, bias, positions, torch.empty(8, 8 * SPREAD + 1)) is CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(("word", "value"), [("true", True), ("false", False), ("selective", Selective.selective)])
def test_words(word: str, value: bool | Selective) -> None:
    config = compose(["experiment=quickstart", f"trainer.activation_checkpointing={word}"]).config
    assert config.trainer.activation_checkpointing is value


def test_packed_rows_in_one_kernel_are_not_attended_again() -> None:
    """torch's varlen kernel runs on GPUs only; tensors without values show which operations a checkpoint repeats."""
    kernel = varlen.torch_varlen()
    assert kernel is not None

    def layer(states: torch.Tensor, boundaries: varlen.Boundaries) -> torch.Tensor:
        return kernel.compute(states, states, states, boundaries, 0.25, None).sin()

    def calls(options: dict[str, Any]) -> int:
        with FakeTensorMode(), Counted() as counted:
            states = torch.empty(8, 2, 16, dtype=torch.bfloat16, requires_grad=True)
            boundaries = varlen.Boundaries(torch.empty(3, dtype=torch.int32), 5)
            checkpoint(layer, states, boundaries, **options).sum().backward()
        return counted.calls["torch_attn::_varlen_attn"]

    assert calls(checkpointing_options(True)) == 2
    assert calls(checkpointing_options(Selective.selective)) == 1
