"""States in host memory at stages 1 and 2, weights too at stage 3: the plain loop's losses and weights, and a resume to the bit."""

from __future__ import annotations

import pytest
import torch
from parity.reference import train_plainly
from parity.test_ladder import PROGRAM, Workshop, exact
from safetensors.torch import load_file
from support.ranks import run_ranks

pytestmark = pytest.mark.ci  # a minute; what it computes has its place in the matrix of methods too

OFFLOADED = {stage: [f"zero=stage{stage}", "zero.offload_optimizer=cpu", "data.packing=false"] for stage in (1, 2)}
OFFLOADED[3] = ["zero=stage3_offload", "data.packing=false"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("offload"))


def test_offloaded_states_compute_the_same_and_a_run_resumes_to_the_bit(workshop, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(workshop.folder / "cache"))
    plain = train_plainly(workshop.composed("plain", "data.packing=false").config, workshop.folder / "cache")
    limit = "run.time_limit=0.000001"  # over after the first step of each launch
    adamw = ["optimizer=adamw", "optimizer.lr=1e-2"]
    first, second = [], []
    for stage, offloaded in OFFLOADED.items():
        first.append(workshop.case(f"s{stage}", *offloaded))
        first.append(workshop.case(f"s{stage}-whole", *offloaded, *adamw))
        first.append(workshop.case(f"s{stage}-cut", *offloaded, *adamw, limit))
        second.append(workshop.case(f"s{stage}-end", *offloaded, *adamw, directory=f"s{stage}-cut"))
    run_ranks(PROGRAM, 2, first)
    run_ranks(PROGRAM, 2, second)
    for stage in OFFLOADED:
        rows = workshop.rows(f"s{stage}")
        assert [row["loss"] for row in rows] == pytest.approx(plain.losses, rel=2e-6)
        assert [row["grad_norm"] for row in rows] == pytest.approx(plain.grad_norms, rel=5e-6)
        trained = workshop.weights(f"s{stage}")
        assert all((trained[key] - weight).abs().max() < 2e-6 for key, weight in plain.weights.items())
        whole, cut = workshop.folder / f"s{stage}-whole", workshop.folder / f"s{stage}-cut"
        assert exact(cut) == exact(whole)
        left, right = (load_file(folder / "export" / "model.safetensors") for folder in (whole, cut))
        assert all(torch.equal(left[key], right[key]) for key in left)
