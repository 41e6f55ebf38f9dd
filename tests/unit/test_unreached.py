"""Parts of a vision-language model that rows of text never reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from dstune.core.errors import UserError
from dstune.models.layers import layers_of
from dstune.models.unreached import find_unreached, is_within, keep_frozen, unreached_parameters, verify_unreached
from tests.support.tiny_vl import CONFIGS, build

PARTS = {
    "gemma3": {"model.vision_tower", "model.multi_modal_projector"},
    "qwen3_5": {"model.visual"},
    "qwen3_vl": {"model.visual"},
    "mistral3": {"model.vision_tower", "model.multi_modal_projector"},
    "gemma4": {"model.vision_tower", "model.embed_vision"},
}


def frozen(kind: str) -> Any:
    model = build(kind)
    model.dstune_unreached = find_unreached(model)
    keep_frozen(model)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_frozen_is_exactly_what_gets_no_gradient(kind: str) -> None:
    model = build(kind)
    assert set(find_unreached(model)) == PARTS[kind]
    model(input_ids=torch.arange(10)[None]).logits.sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if is_within(name, find_unreached(model))} != set()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_forward_pass_proves_that_the_parts_do_not_matter(kind: str) -> None:
    model = frozen(kind)
    verify_unreached(model, model, torch.device("cpu"))
    model.dstune_unreached = (*model.dstune_unreached, "model.language_model.layers.1")
    with pytest.raises(UserError) as caught:
        verify_unreached(model, model, torch.device("cpu"))
    assert [problem.where for problem in caught.value.problems] == ["model.unreached_parts"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_are_those_of_the_language_model(kind: str) -> None:
    model = frozen(kind)
    layers = layers_of(model)
    assert len(layers.blocks) == 2
    names = [name for part in layers.parts for name in part]
    unreached = {name for name, _ in unreached_parameters(model)}
    assert set(names) == {name for name, _ in model.named_parameters()} - unreached


def test_heads_beside_the_body_are_reached() -> None:
    config = CONFIGS["gemma3"]()
    for loader, prefix in ((AutoModel, ""), (AutoModelForSequenceClassification, "model.")):
        model = loader.from_config(config)
        assert set(find_unreached(model)) == {f"{prefix}vision_tower", f"{prefix}multi_modal_projector"}


def test_a_model_of_text_alone_has_no_such_parts() -> None:
    model = AutoModel.from_config(CONFIGS["gemma3"]().text_config)
    assert find_unreached(model) == ()
    assert unreached_parameters(model) == []
