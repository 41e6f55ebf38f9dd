"""What rows with images take beside their tokens: activations and arithmetic of the tower that sees, and what is trained of it.

A tower is a transformer over the patches of each image. A frozen one keeps nothing for the backward pass, so that one block works
at a time. Of one that is trained each block keeps, for a patch: the inputs and outputs of two norms, queries, keys, values, what is
attended, and the feed-forward part's inner states (held against torch in `tests/unit/test_plan_vision.py`).
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
    """At most."""
    width: int
    height: int
    """Pixels of the largest, before the processor resizes it."""
    patches: int
    """Of one image, padding included: positions of the tower."""
    tokens: int
    """Of one image, in the row."""
    values: int
    """Numbers that the tower is given of one image."""
    origin: str
    """How this is known, for people."""


@dataclass(frozen=True)
class Tower:
    """The part of a model that sees images."""

    sizes: TowerSizes
    weights: int
    """With projectors."""
    learns: bool = False
    images: Images | None = None
    """None where rows are taken to hold none."""

    def block_bytes(self, patches: int, weight_bytes: int) -> int:
        """Return the bytes that a block keeps for the backward pass."""
        t = self.sizes
        return patches * weight_bytes * (8 * t.width + t.inner_states * t.inner)

    def working_bytes(self, patches: int, weight_bytes: int) -> int:
        """Return the bytes of a block's forward pass where nothing is kept: its input, and attention or the feed-forward part."""
        t = self.sizes
        return patches * weight_bytes * (2 * t.width + max(4 * t.width, 2 * t.inner))

    def forward_flops(self, patches: int, images: int) -> float:
        """Return the operations for `images` images with `patches` patches together."""
        t = self.sizes
        of_patch = 2.0 * (4 * t.width**2 + t.matrices * t.width * t.inner)
        return t.blocks * patches * (of_patch + 4.0 * t.width * patches / max(1, images))


def tower_of(whole: Mapping[str, Any]) -> Tower | None:
    """Return the tower of the model that a whole `config.json` describes; None where it sees no images."""
    vision = whole.get("vision_config")
    if not isinstance(whole.get("text_config"), Mapping) or not isinstance(vision, Mapping):
        return None
    sizes = sizes_of_tower(vision)
    return None if sizes is None else Tower(sizes, tower_weights(whole))


def trained_part(tower: Tower, *, adapter_rank: int) -> Tensor:
    """Return what `model.train_vision` adds to the trained weights: the whole tower, or (with a rank) the two matrices beside each
    of its linear layers."""
    t = tower.sizes
    if not adapter_rank:
        return Tensor("vision_tower", (tower.weights,))
    return Tensor("vision_tower.lora", (t.blocks * adapter_rank * (8 * t.width + t.matrices * (t.width + t.inner)),))


def approximate_images(whole: Mapping[str, Any], in_row: int, width: int, height: int, origin: str) -> Images | None:
    """Return `Images` without the model's processor: of towers with one size of images that size, of others that of the images."""
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
"""Kinds whose processors bring every image to one size."""
