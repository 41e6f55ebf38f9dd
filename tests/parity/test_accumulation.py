"""bf16 runs sum the gradients of a global batch in fp32: 64 micro-batches against the same 64 summed in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity.accumulate_ranks import MICRO_BATCHES, TARGETS, micro_batch, window_config
from support.ranks import run_ranks
from support.tiny import save_decoder

from dstune.models.load import load_model, load_tokenizer
from dstune.protocols import task_of

STAGES = (1, 2, 3)
RANKS = 2
BOUND = 0.004
"""Relative L2. Measured: 0.0015 at stages 2 and 3, 0.0024 at stage 1, which is the rounding of gradients that travel
between ranks in bf16; 0.0062 to 0.0064 where they are summed in bf16."""


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[tuple[int, str | None], float]:
    """Relative L2 distance to the reference of all gradients together, by (stage, type of accumulation)."""
    folder = tmp_path_factory.mktemp("accumulation")
    model = str(save_decoder(folder / "model"))
    keys = [(stage, kind) for stage in STAGES for kind in (None, "bf16")]
    files = {key: folder / f"stage{key[0]}-{key[1]}.pt" for key in keys}
    program = Path(__file__).with_name("accumulate_ranks.py")
    cases = [
        {"model": model, "stage": stage, "accumulate_in": kind, "file": str(files[stage, kind])} for stage, kind in keys
    ]
    run_ranks(program, RANKS, cases)
    expected = summed_in_float64(model)
    return {key: distance(torch.load(file), expected) for key, file in files.items()}


def summed_in_float64(path: str) -> dict[str, torch.Tensor]:
    """Every micro-batch's bf16 gradient by plain autograd, summed without rounding."""
    config = window_config(path, 1)
    model = load_model(config, load_tokenizer(config.model), (), torch.bfloat16)
    model.train()
    head = task_of(config.task).head(model)
    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in model.named_parameters()}
    for index in range(MICRO_BATCHES):
        (head(model, micro_batch(index)).loss_sum * (RANKS / TARGETS)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad.double() / RANKS
            parameter.grad = None
    return total


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].double() - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


@pytest.mark.parametrize("stage", STAGES)
def test_64_micro_batches_are_summed_in_fp32(differences, stage):
    assert differences[stage, None] < BOUND
    assert differences[stage, "bf16"] > BOUND, "the bound would not notice sums in bf16"


def test_at_stage_3_what_fits_is_gathered_once_to_generate(tmp_path):
    file = tmp_path / "found.json"
    model = save_decoder(tmp_path / "model")
    run_ranks(Path(__file__).with_name("generate_ranks.py"), RANKS, [str(model), str(file)])
    total, ((in_step, every, *computed), *others) = json.loads(file.read_text())
    assert in_step and every >= total
    assert [(together, same) for together, _, *same in others] == [
        (True, computed),
        (True, computed),
        (False, computed),
    ]
    assert [passed for _, passed, *_ in others] == sorted((passed for _, passed, *_ in others), reverse=True)
    assert others[0][1] <= 0.6 * every and others[1][1] <= 0.2 * every and others[2][1] == 0
