"""Every method at every ZeRO stage on two ranks: frozen weights keep every bit, trained ones move, all stages agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.tiny import save_decoder, save_encoder

PROGRAM = Path(__file__).with_name("method_ranks.py")
KINDS = [
    ("full", "chat"),
    ("lora", "chat"),
    ("lora on the projection", "chat"),
    ("projection saved whole", "chat"),
    ("layer decay", "chat"),
    ("freeze", "chat"),
    ("freeze names", "classification"),
    ("full", "classification"),
    ("head", "classification"),
    ("lora", "classification"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("methods")
    cases = [{"method": m, "task": t, "stage": s} for s in range(4) for m, t in KINDS]
    cases += [
        {"method": method, "task": "chat", "stage": stage, "checkpointing": kind}
        for kind in ("true", "selective")
        for stage in (2, 3)
        for method in ("full", "lora")
    ]
    cases += [
        {"method": method, "task": "chat", "stage": stage, "checkpointing": kind, "tiles": 3}
        for method, stage, kind in (("full", 2, None), ("full", 3, "true"), ("lora", 3, None))
    ]
    cases += [{"method": "full", "task": "chat", "stage": 3, "offload": True}]
    models = {
        "decoder": str(save_decoder(folder / "decoder")),
        # Without dropout, so that checkpointing and all stages see the same network.
        "encoder": str(save_encoder(folder / "encoder", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    }
    output = run_ranks(PROGRAM, 2, {**models, "cases": cases})[0]
    found = [json.loads(line.removeprefix("CASE ")) for line in output.splitlines() if line.startswith("CASE ")]
    assert len(found) == len(cases)
    return found


def test_frozen_weights_are_bit_identical_and_trained_ones_move(results):
    for result in results:
        assert result["frozen_equal"], result
        assert result["trained_moved"], result
        assert (result["frozen"] > 0) is (result["method"] not in ("full", "layer decay")), result


@pytest.mark.parametrize(("method", "task"), KINDS)
def test_all_stages_agree(results, method, task):
    """Checkpointed and offloaded runs included: what is computed does not depend on where it is kept."""
    same = [r for r in results if (r["method"], r["task"]) == (method, task)]
    assert len(same) >= 4
    for result in same[1:]:
        assert result["losses"] == pytest.approx(same[0]["losses"], rel=1e-5), result
        assert result["norms"] == pytest.approx(same[0]["norms"], rel=1e-4), result
