"""LoRA's sum in one product: that of peft but for rounding, and peft's own where it is more than that."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dstune.models.lora_sum import use_joint_sums

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def adapted(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)).to(dtype)
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    }
    return peft.get_peft_model(model, peft.LoraConfig(**(settings | changes)), autocast_adapter_dtype=False).train()


def passes(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rows = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    logits = model(input_ids=rows, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_it_is_the_sum_of_peft(dropout: float) -> None:
    theirs = adapted(lora_dropout=dropout)
    ours = copy.deepcopy(theirs)
    assert use_joint_sums(ours) == 14
    expected, found = passes(theirs), passes(ours)
    assert distance(found[0], expected[0]) < 1e-6
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert distance(found[1][name], gradient) < 1e-5, name


def test_in_bf16_it_is_nearer_to_the_exact_sum() -> None:
    theirs = adapted(torch.bfloat16)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    assert use_joint_sums(ours) == 14
    truth = passes(exact)
    errors = [distance(passes(model)[0], truth[0]) for model in (ours, theirs)]
    assert errors[0] < errors[1]


def test_without_adapters_it_is_the_model_below() -> None:
    model = adapted()
    assert use_joint_sums(model) == 14
    rows = torch.randint(50, (1, 5))
    with model.disable_adapter():
        bare = model(input_ids=rows).logits
    with_adapters = model(input_ids=rows).logits
    torch.testing.assert_close(bare, model.unload()(input_ids=rows).logits)
    assert not torch.allclose(bare, with_adapters)


def test_merged_it_is_the_same() -> None:
    model = adapted().eval()
    assert use_joint_sums(model) == 14
    rows = torch.randint(50, (1, 5))
    apart = model(input_ids=rows).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=rows).logits, apart, rtol=1e-4, atol=1e-5)


def test_several_active_adapters_are_left_to_peft() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    rows = torch.randint(50, (1, 5))
    expected = model(input_ids=rows).logits
    use_joint_sums(model)
    torch.testing.assert_close(model(input_ids=rows).logits, expected)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_the_sum_stays_with_peft(changes: dict[str, Any]) -> None:
    assert use_joint_sums(adapted(**changes)) == 0


def test_a_model_without_adapters_is_left_alone() -> None:
    assert use_joint_sums(LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))) == 0
