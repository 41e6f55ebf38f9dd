"""Weights of the parts of a model that rows of text never reach, from its `config.json`: towers of images and sound, projectors.

A transformer in front of the language model, by its sizes: four matrices of attention and two or three of the feed-forward layers
in each block, patches, positions, and what projects onto the language model. Biases and norms are left out; held against
transformers within a tenth (`tests/unit/test_plan_towers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GATED = {"pixtral", "gemma4_vision", "qwen2_5_vl"}
"""Kinds of towers whose feed-forward layers have a third matrix, which their configuration does not tell."""


@dataclass(frozen=True)
class TowerSizes:
    """What a tower's matrices and activations grow with."""

    width: int
    blocks: int
    inner: int
    """Width of the feed-forward layers."""
    matrices: int
    """Of a feed-forward layer."""
    inner_states: int = 2
    """Tensors of `inner` width that a feed-forward layer keeps for the backward pass."""


def sizes_of_tower(tower: Mapping[str, Any]) -> TowerSizes | None:
    """Return the sizes in a part of a `config.json`; None where it is no transformer."""
    width, blocks = _size(tower, "embed_dim", "hidden_size"), _size(tower, "num_hidden_layers", "depth")
    if not width or not blocks:
        return None
    inner = _size(tower, "intermediate_size") or round(width * _ratio(tower))
    if tower.get("model_type") in GATED:
        return TowerSizes(width, blocks, inner, 3, 4)
    # `quick_gelu` is written as a product with a sigmoid, which is kept too.
    quick = tower.get("hidden_act") == "quick_gelu" or ("hidden_act" not in tower and tower.get("model_type") in QUICK)
    return TowerSizes(width, blocks, inner, 2, 3 if quick else 2)


def _ratio(tower: Mapping[str, Any]) -> float:
    ratio = tower.get("mlp_ratio")
    return float(ratio) if isinstance(ratio, int | float) else 4.0


QUICK = {"clip_vision_model", "qwen2_vl", "qwen2_vl_vision"}
"""Kinds of towers with this activation where their configuration names none."""


def tower_weights(config: Mapping[str, Any]) -> int:
    """Return weights of all towers and projectors of the model that a whole `config.json` describes; 0 where it has none."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return 0
    width = _size(text, "hidden_size")
    parts = (part for name, part in config.items() if name.endswith("_config") and name != "text_config")
    return sum(_weights(part, width) for part in parts if isinstance(part, Mapping))


def _weights(tower: Mapping[str, Any], language: int) -> int:
    """Count the weights of one tower and its projector. language: hidden size of the language model."""
    sizes = sizes_of_tower(tower)
    if sizes is None:
        return 0
    width = sizes.width
    block = 4 * width * width + sizes.matrices * width * sizes.inner
    patch = _size(tower, "patch_size")
    channels = _size(tower, "num_channels", "in_channels") or 3
    embedding = channels * patch * patch * (_size(tower, "temporal_patch_size") or 1) * width
    positions = _size(tower, "num_position_embeddings") or (_size(tower, "image_size") // patch) ** 2 if patch else 0
    merged = width * (_size(tower, "spatial_merge_size") or 1) ** 2
    target = _size(tower, "out_hidden_size")
    projector = merged * merged + merged * target if target else width * language
    levels = tower.get("deepstack_visual_indexes")
    projectors = 1 + (len(levels) if isinstance(levels, list) else 0)
    return sizes.blocks * block + embedding + positions * width + projectors * projector


def _size(values: Mapping[str, Any], *names: str) -> int:
    """Return the first of `names` that is a whole number; 0 where none is."""
    return next((value for name in names if type(value := values.get(name)) is int), 0)
