"""Weights of towers by the planner's closed form, against models that transformers builds on the meta device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from dstune.config.compose import compose
from dstune.models.unreached import count_by_part, find_unreached
from dstune.planning.hardware import DEVICES, Cluster
from dstune.planning.memory import memory
from dstune.planning.stage import setup_on
from dstune.planning.towers import tower_weights
from tests.support.tiny_vl import CONFIGS, save

PUBLISHED: dict[str, dict[str, Any]] = {
    "Gemma3Config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    },
    "Qwen3_5Config": {},
    "Qwen3VLConfig": {},
    "Mistral3Config": {},
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_closed_form_is_within_a_tenth(kind: str) -> None:
    vision = PUBLISHED[kind] and {"vision_config": PUBLISHED[kind] | {"image_size": 896, "patch_size": 14}}
    config = getattr(transformers, kind)(**vision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.dstune_unreached = find_unreached(model)
    expected = sum(count_by_part(model).values())
    assert tower_weights(json.loads(config.to_json_string())) == pytest.approx(expected, rel=0.1)


def test_a_model_of_text_has_none() -> None:
    assert tower_weights(CONFIGS["gemma3"]().text_config.to_dict()) == 0
    assert tower_weights({"text_config": {"hidden_size": 8}, "vision_config": {"model_type": "unknown"}}) == 0


@pytest.mark.parametrize("stage", range(4))
def test_memory_has_the_tower_once_and_never_with_states(tmp_path: Path, stage: int) -> None:
    folder = save("gemma3", tmp_path)
    config = compose(["data=files", "data.train=x.jsonl", f"model.path={folder}", "method=full", f"zero.stage={stage}"])
    device = next(iter(DEVICES.values()))
    found, _, model = setup_on(config.config, Cluster(device, per_node=2, nodes=1))
    weights = tower_weights(json.loads((folder / "config.json").read_text()))
    assert found.unreached == weights > 0
    assert found.trained_count == model.parameters
    held, without = memory(found), memory(replace(found, unreached=0))
    more = weights * found.weight_bytes // (found.ranks if stage == 3 else 1)
    assert held.parts["weights"] - without.parts["weights"] == pytest.approx(more, abs=4)
    assert {key: value for key, value in held.parts.items() if key != "weights"} == {
        key: value for key, value in without.parts.items() if key != "weights"
    }
