"""What computes what: in the same words for a run and for `dstune doctor`."""

from __future__ import annotations

import pytest
import torch
from support.tiny import save_decoder

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
    assert list(run) == list(machine) == ["attention", "norms", "cross_entropy", "optimizer"]
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
