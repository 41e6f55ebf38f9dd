"""Compiled gated activations and rotary positions: as exact as the model's own, with less kept, in runs of two ranks."""

from __future__ import annotations

import json

import pytest
import torch
from parity.test_ladder import PROGRAM, Workshop, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.ranks import run_ranks
from support.tiny import save_decoder
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from dstune.config.schema import ModelConfig
from dstune.models.compiled import compiled_functions, use_compiled
from tests.unit.test_attention import load
from tests.unit.test_compiled import BOTH, mlp

COMMON = ["trainer.precision=bf16", "data.packing=false", "optimizer.lr=0.02", "trainer.max_steps=3"]
RUNS = {
    "stage 2, recomputed": ["zero=stage2", "trainer.activation_checkpointing=true"],
    "stage 2, products kept": ["zero=stage2", "trainer.activation_checkpointing=selective"],
    "stage 3, LoRA, packed": ["zero=stage3", "method=lora", "data.packing=true"],
}


def test_runs_that_are_computed_by_them_are_those_of_the_model(workshop: Workshop):  # noqa: F811
    cases = []
    for name, overrides in RUNS.items():
        for kind, more in (("own", []), ("compiled", ["model.fused_activations=true", "model.fused_rotary=true"])):
            cases.append(
                workshop.case(f"{name} {kind}".replace(", ", "-").replace(" ", "-"), *COMMON, *overrides, *more)
            )
    run_ranks(PROGRAM, 2, cases)
    for name in RUNS:
        own, compiled = (f"{name} {kind}".replace(", ", "-").replace(" ", "-") for kind in ("own", "compiled"))
        kernels = json.loads((workshop.folder / compiled / "environment.json").read_text())["kernels"]
        assert [kernels[key] for key in ("activations", "rotary")] == ["one compiled kernel"] * 2, name
        for key, tolerance in (("loss", 2e-3), ("grad_norm", 2e-2)):
            expected, found = ([row[key] for row in workshop.rows(run)] for run in (own, compiled))
            assert found == pytest.approx(expected, rel=tolerance), (name, key)
        assert workshop.rows(own)[-1]["loss"] != workshop.rows(compiled)[-1]["loss"], "something else rounds"


def errors(model: nn.Module, exact: nn.Module) -> list[float]:
    """Of the logits and of each gradient, beside those of the model in fp64."""
    ids = torch.arange(24).reshape(2, 12) % 50
    found = []
    for one in (model, exact):
        one.zero_grad()
        logits = one(input_ids=ids).logits
        logits.double().square().mean().backward()
        found.append([logits.detach().double(), *(weight.grad.double() for weight in one.parameters())])
    return [float((ours - true).norm() / true.norm()) for ours, true in zip(*found, strict=True)]


def test_a_model_computed_by_them_is_as_exact_as_its_own(tmp_path):
    own = load(save_decoder(tmp_path)).bfloat16()
    ours, exact = load(tmp_path).bfloat16(), load(tmp_path).bfloat16().double()
    assert list(use_compiled(ours, BOTH)) == []
    assert all(compiled_functions(ours).values())
    allowed, found = errors(own, exact), errors(ours, exact)
    assert all(theirs <= 1.5 * ours for ours, theirs in zip(allowed, found, strict=True)), (allowed, found)


def test_they_keep_less_for_the_backward_pass():
    kept: list[int] = []
    layer, rows = mlp(LlamaMLP).bfloat16(), torch.randn(1, 6, 8, dtype=torch.bfloat16)

    def elements() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one.numel()), one)[1], lambda one: one):
            layer(rows)
        return sum(kept)

    before = elements()
    assert list(use_compiled(layer, ModelConfig(fused_activations=True))) == []
    assert elements() == before - 6 * 16, "the activated gate"
