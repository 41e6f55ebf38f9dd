"""Optimizer states on a disk: losses and weights of states in memory to the bit, and a resume to the bit, also into memory and
onto another number of ranks."""

from __future__ import annotations

import ctypes.util
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from parity.test_ladder import PROGRAM, Workshop, exact
from safetensors.torch import load_file
from support.ranks import run_ranks

pytestmark = [
    pytest.mark.ci,  # two minutes of compiling where nobody has yet
    pytest.mark.skipif(
        not (shutil.which("g++") and shutil.which("ninja") and ctypes.util.find_library("aio")),
        reason="apt-get install g++ ninja-build libaio-dev",
    ),
]

# Weights of 1 to 2 MiB a rank in the feed-forward layers: DeepSpeed leaves parts below 1 MiB in memory.
LARGE = "model.config_overrides={attention_dropout:0.1,hidden_size:256,intermediate_size:3000,head_dim:64}"
BASE = ["model.weights=random", LARGE, "optimizer=adamw", "optimizer.lr=1e-3", "checkpoint.every=2"]
SMALL_PARTS = "zero.settings={zero_optimization:{sub_group_size:100000}}"
"""Most tensors are a part of their own, some in memory; without it a part has several tensors."""
CUT = "run.time_limit=0.000001"
"""Over after the first step of a launch."""


def weights(workshop: Workshop, name: str) -> dict[str, torch.Tensor]:
    return load_file(workshop.folder / name / "export" / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def losses(workshop: Workshop, name: str) -> list[float]:
    return [row["loss"] for row in workshop.rows(name)]


@contextmanager
def watching(place: Path) -> Iterator[set[str]]:
    """The names of the files that are seen in `place` meanwhile."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            seen.update(path.name for path in place.rglob("*.swp"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "local").mkdir()
    return tmp_path / "local"


@pytest.mark.parametrize(("precision", "parts"), [("fp32", [SMALL_PARTS]), ("bf16", [])])
def test_states_on_a_disk_compute_the_same_and_a_run_goes_on_anywhere(precision, parts, place, tmp_path):
    workshop = Workshop(tmp_path)
    memory = [*BASE, f"trainer.precision={precision}", "zero=stage3"]
    disk = [*memory[:-1], "zero=stage3_nvme", f"zero.nvme_path={place}", *parts]

    first = [workshop.case("memory", *memory), workshop.case("disk", *disk), workshop.case("disk-cut", *disk, CUT)]
    with watching(place) as seen:
        run_ranks(PROGRAM, 2, [*first, workshop.case("memory-cut", *memory, CUT), workshop.case("moved", *disk, CUT)])
    assert any(name.startswith("exp_avg-") for name in seen), "moments are on the disk"
    on_disk = [workshop.case("disk-end", *disk, directory="disk-cut")]
    run_ranks(PROGRAM, 2, [*on_disk, workshop.case("into", *disk, directory="memory-cut")])
    run_ranks(PROGRAM, 3, [workshop.case("out", *memory[:-1], "zero=stage2", directory="moved")])

    assert exact(workshop.folder / "disk-cut") == exact(workshop.folder / "disk")
    for name in ("disk", "disk-cut", "memory-cut"):
        assert losses(workshop, name) == losses(workshop, "memory")
        assert same(weights(workshop, name), weights(workshop, "memory")), name
    # Another number of ranks adds gradients up in another order, in bf16 with three digits.
    bound = {"fp32": 1e-5, "bf16": 0.02}[precision]
    moved, whole = weights(workshop, "moved"), weights(workshop, "memory")
    assert max(float((moved[key] - whole[key]).abs().max()) for key in whole) < bound
    assert not list(place.iterdir()), "the run's files go with it"


def test_three_ranks_with_uneven_shares_and_a_run_that_rolls_back(place, tmp_path):
    """And with another optimizer, and adapters beside whole tensors."""
    workshop = Workshop(tmp_path)
    momentum = [*BASE, "optimizer=sgd", "optimizer.lr=0.01", "optimizer.momentum=0.9"]
    spiking = [*BASE, "trainer.spike.action=rollback", "trainer.spike.window=8", "trainer.max_steps=11"]
    adapters = [*BASE, "method=lora", "method.rank=4", "method.modules_to_save=[lm_head,embed_tokens]"]
    # In the same parts: AdamW rounds the last elements of a part, which do not fill a vector, in another way.
    places = {
        "memory": ["zero=stage3", SMALL_PARTS],
        "disk": ["zero=stage3_nvme", f"zero.nvme_path={place}", SMALL_PARTS],
    }
    cases = []
    for where, zero in places.items():
        cases.append(workshop.case(f"momentum-{where}", *momentum, *zero))
        cases.append(workshop.case(f"adapters-{where}", *adapters, *zero))
        cases.append(workshop.case(f"spike-{where}", *spiking, *zero) | {"leap": [7, 30.0]})
    run_ranks(PROGRAM, 3, cases)
    for kind in ("momentum", "adapters", "spike"):
        assert losses(workshop, f"{kind}-disk") == losses(workshop, f"{kind}-memory"), kind
    for kind in ("momentum", "spike"):
        assert same(weights(workshop, f"{kind}-disk"), weights(workshop, f"{kind}-memory")), kind
