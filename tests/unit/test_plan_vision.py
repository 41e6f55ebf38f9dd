"""The plan of rows with images: what a tower keeps against torch, patches against processors, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.launch import plan as planner
from dstune.launch.plan_images import images_of, parse_images
from dstune.planning.hardware import DEVICES, Cluster
from dstune.planning.memory import memory
from dstune.planning.stage import setup_on
from dstune.planning.vision import tower_of
from tests.support.sight import save, write_rows

CLUSTER = Cluster(next(iter(DEVICES.values())), per_node=2, nodes=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plan")
    save("qwen2_vl", place / "model")
    write_rows(place / "data", 5, images=lambda row: row % 3, sizes=((32, 32), (64, 30)))
    return place


def config(folder: Path, *changes: str) -> Any:
    words = [
        f"model.path={folder / 'model'}",
        "data=files",
        f"data.train={folder / 'data' / 'rows.jsonl'}",
        "task=chat",
    ]
    return compose([*words, "data.max_length=128", "zero.stage=2", "data.packing=false", *changes]).config


def saved_bytes(model: torch.nn.Module, **inputs: torch.Tensor) -> int:
    """Of the tensors that a forward pass keeps for the backward pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: alive.append(tensor) or pack(tensor), lambda t: t):
        model(**inputs)
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_a_tower_keeps_is_within_a_seventh_of_torch(kind: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"image_size": 96, "patch_size": 8}
    name = {"clip": "CLIPVision", "siglip": "SiglipVision"}[kind]
    vision = getattr(transformers, f"{name}Config")(**sizes, attn_implementation="sdpa")
    model = getattr(transformers, f"{name}Model")(vision)
    measured = saved_bytes(model, pixel_values=torch.randn(2, 3, 96, 96))
    tower = tower_of({"text_config": {"hidden_size": 64}, "vision_config": vision.to_dict()})
    assert tower is not None
    assert 4 * tower.block_bytes(2 * 144, 4) == pytest.approx(measured, rel=1 / 7)


def test_patches_are_those_of_the_processor(folder: Path) -> None:
    found = images_of(config(folder), None)
    assert found is not None
    assert (found.in_row, found.width, found.height) == (2, 64, 30), "the most and the largest of the rows"
    # 64 x 30 pixels in patches of 14, merged 2 x 2: 56 x 28 pixels.
    assert (found.patches, found.tokens) == (8, 2)
    stated = images_of(config(folder), parse_images("3x32x32"))
    assert stated is not None
    assert (stated.in_row, stated.patches, stated.values) == (3, 4, 4 * 1176)


@pytest.mark.parametrize("text", ["0x3x3", "10", "1x2x3x4", "axb", "-1x4"])
def test_sizes_that_are_none(text: str) -> None:
    assert parse_images(text) is None
    with pytest.raises(UserError, match="images"):
        planner.parse([f"images={text}"])


def test_images_that_a_row_has_no_room_for(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_length"):
        images_of(config(folder, "data.max_length=16"), (8, 64, 64))
    with pytest.raises(UserError, match="task=causal_lm reads no images"):
        images_of(config(folder, "task=causal_lm"), (1, 32, 32))


def test_a_trained_tower_takes_states_and_activations(folder: Path) -> None:
    plain = config(folder)
    images = images_of(plain, (2, 64, 64))
    without, _, _ = setup_on(plain, CLUSTER)
    frozen, _, _ = setup_on(plain, CLUSTER, images)
    trained, _, _ = setup_on(config(folder, "model.train_vision=true"), CLUSTER, images)
    adapted, _, _ = setup_on(config(folder, "model.train_vision=true", "method=lora"), CLUSTER, images)
    weights = frozen.unreached
    assert weights > 0 and trained.unreached == 0
    assert trained.trained_count - frozen.trained_count == weights
    assert trained.total == frozen.total + weights
    assert adapted.unreached == weights and adapted.trained[-1].count > 0
    parts = [memory(found).moments for found in (without, frozen, trained)]
    assert "images" not in parts[0]["backward"]
    assert 0 < parts[1]["backward"]["images"] < parts[2]["backward"]["images"] < parts[2]["tower"]["images"]
    assert parts[2]["step"]["optimizer"] > parts[1]["step"]["optimizer"]


def test_the_command_says_what_it_plans(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model.path={folder / 'model'}", "task=chat", "data.max_length=128", "hardware=2xA100-40G"]
    assert planner.main([*words, "images=2x64x64", "data.packing=false"]) == 0
    shown = capsys.readouterr().out
    assert "2 images of 64 x 64 pixels per row (as stated)" in shown and "is frozen" in shown
    assert planner.main([*words, "images=64x64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["images"]
    assert found["in_row"] == 128 // found["tokens"], "packed rows have as many as there is room for"
