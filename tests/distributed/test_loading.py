"""Models at stage 3 are those of the other stages to the bit, and each rank takes its part from the files by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.ranks import run_ranks

PROGRAM = Path(__file__).with_name("loading_ranks.py")


@pytest.fixture(scope="module", params=[2, 3])
def outcomes(request, tmp_path_factory) -> list[dict]:
    """What every rank found. Of three ranks none has a part of a size that divides."""
    lines = run_ranks(PROGRAM, request.param, str(tmp_path_factory.mktemp("models")))
    return [json.loads(line.splitlines()[-1]) for line in lines]


def test_weights_and_buffers_are_those_of_a_model_loaded_whole(outcomes) -> None:
    for found in map(without_lost, outcomes):
        assert {case: rank["wrong"] for case, rank in found.items() if rank["wrong"]} == {}
        # A matrix with new rows is cut when the engine is made.
        assert [case for case, rank in found.items() if not rank["in_parts"]] == ["added tokens"]
        assert all(len(set(rank["dtype"])) == 1 for rank in found.values()), "the configuration has another type"


def without_lost(found: dict) -> dict:
    return {case: value for case, value in found.items() if case != "lost"}


def test_a_rank_that_is_gone_is_no_fault_of_the_files(outcomes) -> None:
    assert outcomes[0]["lost"] not in ("UserError", None)


def test_linear_layers_let_go_of_gathered_weights_until_the_backward_pass(outcomes) -> None:
    """DeepSpeed's linear function gathers a weight again, where torch's would keep the gathered one: those of all layers."""
    assert all(found["as stored"]["own_linear"] for found in outcomes), "the first model that is loaded replaces it"


def test_nothing_is_sent_but_new_weights(outcomes) -> None:
    sent = {case: rank["sent"] for case, rank in without_lost(outcomes[0]).items()}
    assert sent["as stored"] == sent["several files"] == sent["rounded buffer"] == 0
    assert sent["new head"] == 2 * (40 * 2 + 2), "not the bytes of a matrix and of biases for two labels, in bf16"
    assert sent["joined experts"] > 0 and sent["other files"] > 0, "rank 0's weights were not sent"
