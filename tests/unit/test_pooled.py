"""Pooling against hand arithmetic, and when the parts of a model begin to train."""

from __future__ import annotations

import pytest
import torch

from dstune.methods.ulmfit.config import UlmfitConfig
from dstune.methods.ulmfit.unfreezing import first_steps
from dstune.models.pooled import pool

HIDDEN = torch.arange(12.0).view(2, 3, 2)  # rows [[0 1] [2 3] [4 5]] and [[6 7] [8 9] [10 11]]


@pytest.mark.parametrize(
    ("pooling", "mask", "expected"),
    [
        ("cls", [[1, 1, 1], [1, 1, 0]], [[0, 1], [6, 7]]),
        ("cls", [[0, 1, 1], [0, 0, 1]], [[2, 3], [10, 11]]),  # padded on the left
        ("last", [[1, 1, 1], [1, 1, 0]], [[4, 5], [8, 9]]),
        ("last", [[0, 1, 1], [1, 0, 0]], [[4, 5], [6, 7]]),
        ("mean", [[1, 1, 1], [1, 1, 0]], [[2, 3], [7, 8]]),
    ],
)
def test_pooling(pooling, mask, expected):
    found = pool(HIDDEN, torch.tensor(mask), pooling)
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float32))


class Epochs:
    """A supply with epochs of 10 steps."""

    def steps(self, epochs: int) -> int:
        return 10 * epochs


@pytest.mark.parametrize(
    ("keys", "begins"),
    [
        ({}, [(0, ("top",)), (10, ("c",)), (20, ("b",)), (30, ("a",))]),
        ({"unfreeze_epochs": 0.25}, [(0, ("top",)), (2, ("c",)), (5, ("b",)), (8, ("a",))]),
        ({"unfreeze_epochs": 0.0}, [(0, ("top",)), (0, ("c",)), (0, ("b",)), (0, ("a",))]),
        ({"unfreeze_steps": 3, "layers_at_once": 2}, [(0, ("top",)), (3, ("c", "b")), (6, ("a",))]),
    ],
)
def test_parts_begin_from_the_top(keys, begins):
    assert first_steps(UlmfitConfig(**keys), (("a",), ("b",), ("c",), ("top",)), Epochs()) == begins
