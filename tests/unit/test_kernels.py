"""What computes what: in the same words for a run and for `dstune doctor`."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from support.tiny import save_decoder

from dstune.launch import checks
from dstune.models import kernels, varlen
from dstune.models.attention import SamplesApart
from dstune.models.heads.language import CausalLmHead
from dstune.models.norms import use_lean_norms
from dstune.models.varlen import Kernel
from dstune.zero import accelerator
from tests.unit.test_attention import load
from tests.unit.test_varlen import looped, raising


def test_a_run_and_the_machine_name_the_same_operations_in_the_same_words(tmp_path):
    model = load(save_decoder(tmp_path))
    use_lean_norms(model)
    head = CausalLmHead(model, SamplesApart(model))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert kernels.of_run(model, model, head, optimizer)["cross_entropy"] == "whole logits"
    head.examine(model, torch.device("cpu"))
    run, machine = kernels.of_run(model, model, head, optimizer), kernels.of_machine()
    assert (
        list(run) == list(machine) == [*("attention", "norms", "activations", "rotary", "cross_entropy", "optimizer")]
    )
    assert {name: run[name] for name in ("attention", "norms", "optimizer")} == {
        "attention": "samples one by one", "norms": "blocks of rows", "optimizer": "torch AdamW fused",
    }  # fmt: skip
    assert all("chunks of " in found["cross_entropy"] for found in (run, machine))
    assert (
        kernels.of_run(load(tmp_path), model, None, torch.optim.SGD(model.parameters()))["attention"]
        == "dstune_samples"
    )


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([Kernel("a loop", looped)], "a loop"),
        ([], "sdpa"),
        ([Kernel("a compiled one", pytest.fail, compiled=True)], "a compiled one where it compiles"),
    ],
)
def test_the_machine_names_the_kernel_that_computes_there(monkeypatch, others, named):
    monkeypatch.setattr(accelerator, "present", lambda: True)
    monkeypatch.setattr(accelerator, "has_bf16", lambda: True)
    monkeypatch.setattr(accelerator, "current", lambda: torch.device("cpu"))
    monkeypatch.setattr(varlen, "kernels", lambda: iter([Kernel("raising", raising), *others]))
    attention = kernels.of_machine()["attention"]
    assert attention == f"{named}, not raising: RuntimeError head dimension at most 256"


def test_logits_are_said_to_be_wide_only_where_one_product_makes_them(tmp_path, monkeypatch):
    """Not of fp16, of a projection with an adapter or a bias: their logits are the model's own."""
    monkeypatch.setattr(kernels, "supports_fp32_products", lambda device, dtype: True)
    for dtype, bias, expected in (
        (torch.bfloat16, False, "float32"),
        (torch.float16, False, "float16"),
        (torch.bfloat16, True, "bfloat16"),
    ):
        model = load(save_decoder(tmp_path)).to(dtype)
        if bias:
            model.lm_head = torch.nn.Linear(32, 105, dtype=dtype)
        head = CausalLmHead(model)
        assert head.examine(model, torch.device("cpu"))
        found = kernels.of_run(model, model, head, torch.optim.SGD(model.parameters()))["cross_entropy"]
        assert found.endswith(f"logits in {expected}"), (dtype, bias)


@pytest.mark.parametrize(
    ("kind", "rocm", "named", "shows"),
    [("cuda", False, "", "nvidia-smi"), ("cuda", True, "ROCm", "rocm-smi"), ("xpu", False, "xpu", "xpu-smi")],
)
def test_doctor_says_on_which_accelerators_nothing_was_tested(monkeypatch, kind, rocm, named, shows):
    found = {"ops": {}, "gpus": [["one", 2**30, 2**34]], "kind": kind, "rocm": rocm, "cuda_build": "x"}
    ran = SimpleNamespace(stdout=f"FOUND {json.dumps(found)}", stderr="", returncode=0)
    monkeypatch.setattr(checks.subprocess, "run", lambda *arguments, **more: ran)
    said = {check.name: check for check in checks.software()}
    assert said["accelerators"].fix == f"{shows} shows who uses them"
    assert [said["tests"].detail] == [f"no test of dstune has run on {named}"] if named else "tests" not in said


def test_doctor_says_what_the_machine_computes_by(monkeypatch):
    found = {
        "ops": {},
        "gpus": [],
        "kind": "cpu",
        "cuda_build": None,
        "kernels": {"cross_entropy": "chunks", "norms": "n"},
    }
    ran = SimpleNamespace(stdout=f"FOUND {json.dumps(found)}", stderr="", returncode=0)
    monkeypatch.setattr(checks.subprocess, "run", lambda *arguments, **more: ran)
    (named,) = (check for check in checks.software() if check.name == "kernels")
    assert (named.status, named.detail) == (checks.PASS, "cross entropy: chunks; norms: n")
