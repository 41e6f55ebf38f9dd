"""Weights that a server reads: one version is on the disk, however often a run was started."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from dstune.tasks.reinforcement.published_weights import PublishedWeights

ALONE = SimpleNamespace(is_main=True, broadcast=lambda value: value)


class Model(nn.Linear):
    def save_pretrained(self, folder, state_dict):
        (folder / "model").write_bytes(state_dict["weight"].numpy().tobytes())


def test_what_earlier_launches_left_is_removed(tmp_path):
    model = Model(2, 2)
    left = PublishedWeights(SimpleNamespace(module=model), ALONE, tmp_path).write()
    (tmp_path / "of somebody").mkdir()
    with torch.no_grad():
        model.weight += 1
    weights = PublishedWeights(SimpleNamespace(module=model), ALONE, tmp_path)
    version = weights.write()
    assert version != left and version == weights.write()
    weights.remove_earlier(version)
    assert sorted(path.name for path in tmp_path.iterdir()) == [version, "of somebody"]
