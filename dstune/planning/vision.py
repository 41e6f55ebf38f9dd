"""Costs of images in addition to their tokens: activations, arithmetic and trained weights of the vision tower.

A vision tower is a transformer over the patches of each image. A frozen tower keeps nothing for the backward pass: only one block's
activations are in memory at a time. In a trained tower each block keeps, for each patch, the inputs and outputs of two norms, the
queries, keys and values, the attention's output, and the feed-forward part's inner states (`tests/unit/test_plan_vision.py`
compares this with torch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstune.planning.architecture import Tensor
from dstune.planning.towers import TowerSizes, sizes_of_tower, tower_weights


@dataclass(frozen=True)
class Images:
    """The images of a row, as the model's processor cuts them."""

    in_row: int
    """Largest number of images in a row."""
    width: int
    height: int
    """Width and height of the largest image in pixels, before the processor resizes it."""
    patches: int
    """Patches of one image, including padding; each is a position of the tower."""
    tokens: int
    """Tokens of one image in the row."""
    values: int
    """Numbers in the tower's input for one image."""
    origin: str
    """How these numbers were obtained, for the reader of a plan."""


@dataclass(frozen=True)
class Tower:
    """The part of a model that encodes images."""

    sizes: TowerSizes
    weights: int
    """Number of weights, including projectors."""
    learns: bool = False
    images: Images | None = None
    """The images of a row; None if rows are assumed to have none."""

    def block_bytes(self, patches: int, weight_bytes: int) -> int:
        """Return the bytes that a block keeps for the backward pass over `patches` patches."""
        t = self.sizes
        return patches * weight_bytes * (8 * t.width + t.inner_states * t.inner)

    def working_bytes(self, patches: int, weight_bytes: int) -> int:
        """Return the bytes of a block's forward pass if it keeps nothing: its input, and attention or the feed-forward part."""
        t = self.sizes
        return patches * weight_bytes * (2 * t.width + max(4 * t.width, 2 * t.inner))

    def forward_flops(self, patches: int, images: int) -> float:
        """Return the floating-point operations of a forward pass over `images` images with `patches` patches in total."""
        t = self.sizes
        of_patch = 2.0 * (4 * t.width**2 + t.matrices * t.width * t.inner)
        return t.blocks * patches * (of_patch + 4.0 * t.width * patches / max(1, images))


def tower_of(whole: Mapping[str, Any]) -> Tower | None:
    """Return the tower of the model with this `config.json`, of which `whole` has all sections; None for a model without images."""
    vision = whole.get("vision_config")
    if not isinstance(whole.get("text_config"), Mapping) or not isinstance(vision, Mapping):
        return None
    sizes = sizes_of_tower(vision)
    return None if sizes is None else Tower(sizes, tower_weights(whole))


def trained_part(tower: Tower, *, adapter_rank: int) -> Tensor:
    """Return the weights that `model.train_vision` adds to the trained ones, as one tensor: all of the tower, or the adapter
    matrices of its linear layers. adapter_rank: 0 without adapters."""
    t = tower.sizes
    if not adapter_rank:
        return Tensor("vision_tower", (tower.weights,))
    return Tensor("vision_tower.lora", (t.blocks * adapter_rank * (8 * t.width + t.matrices * (t.width + t.inner)),))


def approximate_images(whole: Mapping[str, Any], in_row: int, width: int, height: int, origin: str) -> Images | None:
    """Estimate `Images` without the model's processor, from the size that the processor resizes all images to (`ONE_SIZE`),
    otherwise from `width` and `height`. Returns None if `config.json` has no patch size."""
    vision = whole["vision_config"]
    patch = vision.get("patch_size") or 0
    if type(patch) is not int or patch < 1:
        return None
    size = vision.get("image_size")
    if whole.get("model_type") in ONE_SIZE and type(size) is int:
        width_seen, height_seen = size, size
    else:
        width_seen, height_seen = width, height
    patches = max(1, width_seen // patch) * max(1, height_seen // patch)
    merge = vision.get("spatial_merge_size") or whole.get("spatial_merge_size") or 1
    tokens = whole.get("mm_tokens_per_image") or max(1, patches // merge**2)
    return Images(in_row, width, height, patches, tokens, patches * patch * patch * 3, origin)


ONE_SIZE = ("gemma3", "llava")
"""Values of `model_type` whose processors resize every image to the same size."""
