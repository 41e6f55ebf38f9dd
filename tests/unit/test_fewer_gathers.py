"""Which models are gathered by layers at ZeRO-3, and that small tensors come in one message."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils.z3_leaf_module import z3_leaf_module
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from dstune.zero.fewer_gathers import (
    REPEATING,
    gather_persistent_together,
    handle_layers_whole,
    handle_repeating_modules_whole,
)

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def whole(model: Any) -> int:
    handle_layers_whole(model)
    return sum(map(z3_leaf_module, model.modules()))


def test_layers_that_follow_one_another_are_whole_and_their_input_has_a_gradient() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.model.embed_tokens.requires_grad_(False)
    seen: list[bool] = []
    assert whole(model) == 2
    model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].requires_grad))
    rows = torch.randint(20, (1, 4))
    model(input_ids=rows, use_cache=False)
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    assert seen == [True, False]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_layer_that_trains_nothing_leaves_all_as_they_are(frozen: int) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.model.layers[frozen].requires_grad_(False)
    assert whole(model) == 0


def test_other_models_are_left_as_they_are() -> None:
    assert whole(MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2))) == 0


def test_what_is_not_there_comes_in_one_message() -> None:
    messages: list[list[Any]] = []

    def one_by_one(param_list: Any, **how: Any) -> str:
        return "one by one"

    def coalesced(parameters: list[Any]) -> Any:
        messages.append(parameters)
        return SimpleNamespace(wait=lambda: None)

    states = [ZeroParamStatus.NOT_AVAILABLE, ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE]
    parameters = [
        SimpleNamespace(ds_status=state, all_gather=one_by_one, all_gather_coalesced=coalesced) for state in states
    ]
    gather_persistent_together(SimpleNamespace(persistent_parameters=parameters))
    assert parameters[0].all_gather(parameters) is None
    assert messages == [[parameters[0], parameters[2]]]
    assert parameters[0].all_gather([parameters[0]]) == "one by one"
    gather_persistent_together(SimpleNamespace(persistent_parameters=[]))


def test_a_module_that_repeats_its_parts_is_gathered_as_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPEATING, "llama", "self_attn")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    handle_repeating_modules_whole(model)
    units = {name for name, module in model.named_modules() if z3_leaf_module(module)}
    assert units == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    handle_repeating_modules_whole(torch.nn.Linear(2, 2))
