"""Optimizer states on a disk: losses and weights of states in memory to the bit, and a resume to the bit, also into memory and
onto another number of ranks."""

from __future__ import annotations

import ctypes.util
import shutil

import pytest
import torch
from parity.test_ladder import PROGRAM, Workshop, exact
from safetensors.torch import load_file
from support.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,  # two minutes of compiling where nobody has yet
    pytest.mark.skipif(
        not (shutil.which("g++") and shutil.which("ninja") and ctypes.util.find_library("aio")),
        reason="apt-get install g++ ninja-build libaio-dev",
    ),
]

# Weights of 2 MiB a rank in the feed-forward layers: DeepSpeed leaves what is smaller than 1 MiB in memory, here the others.
LARGE = "model.config_overrides={attention_dropout:0.1,hidden_size:256,intermediate_size:2048,head_dim:64}"
BASE = ["model.weights=random", LARGE, "optimizer=adamw", "optimizer.lr=1e-3", "checkpoint.every=2"]
CUT = "run.time_limit=0.000001"
"""Over after the first step of a launch."""


def weights(workshop: Workshop, name: str) -> dict[str, torch.Tensor]:
    return load_file(workshop.folder / name / "export" / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_on_a_disk_compute_the_same_and_a_run_goes_on_anywhere(precision, tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    workshop, place = Workshop(tmp_path), tmp_path / "local"
    place.mkdir()
    base = [*BASE, f"trainer.precision={precision}"]
    disk = [
        *base,
        "zero=stage3_nvme",
        f"zero.nvme_path={place}",
        "zero.settings={zero_optimization:{sub_group_size:100000}}",
    ]
    memory = [*base, "zero=stage3"]

    first = [workshop.case("memory", *memory), workshop.case("disk", *disk), workshop.case("disk-cut", *disk, CUT)]
    run_ranks(PROGRAM, 2, [*first, workshop.case("memory-cut", *memory, CUT), workshop.case("moved", *disk, CUT)])
    on_disk = [workshop.case("disk-end", *disk, directory="disk-cut")]
    run_ranks(PROGRAM, 2, [*on_disk, workshop.case("into", *disk, directory="memory-cut")])
    run_ranks(PROGRAM, 3, [workshop.case("out", *base, "zero=stage2", directory="moved")])

    assert exact(workshop.folder / "disk-cut") == exact(workshop.folder / "disk")
    for name in ("disk", "disk-cut", "memory-cut"):
        assert [row["loss"] for row in workshop.rows(name)] == [row["loss"] for row in workshop.rows("memory")]
        assert same(weights(workshop, name), weights(workshop, "memory")), name
    moved, whole = weights(workshop, "moved"), weights(workshop, "memory")
    if precision == "fp32":  # another number of ranks adds gradients up in another order
        assert max(float((moved[key] - whole[key]).abs().max()) for key in whole) < 1e-5
    checkpoint = max((workshop.folder / "disk" / "checkpoints").glob("step-*"))
    assert len(list(checkpoint.glob("weights-rank-00000*"))) > 1, "nothing was on the disk"
    assert not list(place.iterdir()), "the run's files go with it"
