"""A model whose own code fails over text is refused with the line; what a device or another rank does is not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.configs import run_config
from transformers import AutoModelForMultimodalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM

from dstune.config.schema import ZeroConfig
from dstune.core.errors import UserError
from dstune.models.corrections import correct_classes
from dstune.models.heads.language import EncoderDecoderHead
from dstune.trainer.first_pass import refuse_failing_model
from dstune.trainer.sanity_checks import refuse_uneven_gathers

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from tiny_architectures import build, small_config


def test_a_model_that_fails_is_refused_with_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text model returns what the whole model cannot read, as Llama 4's did in transformers 5.24."""
    model = build(AutoModelForMultimodalLM, small_config("llama4"))
    monkeypatch.setattr(Llama4ForCausalLM, "forward", lambda self, **inputs: (torch.zeros(1, 4, 8),))
    with pytest.raises(UserError) as refused, refuse_failing_model("meta-llama/Llama-4", type(model).__name__):
        model(input_ids=torch.arange(4)[None], use_cache=False)
    (problem,) = refused.value.problems
    assert (problem.where, problem.value) == ("model.path", "meta-llama/Llama-4")
    assert "Llama4ForConditionalGeneration fails in its first forward pass" in problem.reason
    assert "modeling_llama4.py" in problem.reason and "'tuple' object has no attribute" in problem.reason


def test_llama_4_reads_text() -> None:
    """Also with transformers 5.24, for which its classes are corrected."""
    model = build(AutoModelForMultimodalLM, small_config("llama4"))
    correct_classes(model.config)
    assert model(input_ids=torch.arange(4)[None], use_cache=False).logits.shape[:2] == (1, 4)


def test_what_a_model_refuses_in_training_alone() -> None:
    """Reformer fills up rows to its positions in evaluation mode, and wants full ones to be trained."""
    model = build(AutoModelForSequenceClassification, small_config("reformer")).eval()
    with refuse_failing_model("a/reformer", "Reformer", raised_there=True):
        model(input_ids=torch.arange(8)[None])
        model.train()
        with (
            pytest.raises(UserError, match="axial_pos_shape"),
            refuse_failing_model("a", "Reformer", raised_there=True),
        ):
            model(input_ids=torch.arange(8)[None])
    handle = model.eval().register_forward_pre_hook(lambda module, inputs: inputs["no such"])
    with pytest.raises(TypeError), refuse_failing_model("a/reformer", "Reformer", raised_there=True):
        model(input_ids=torch.arange(8)[None])  # a callback's hook
    handle.remove()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Connection closed by peer")]
)
def test_what_may_pass_is_no_fault_of_the_model(error: Exception) -> None:
    with pytest.raises(type(error)), refuse_failing_model("a/model", "Model"):
        raise error


def test_a_fault_of_dstune_itself_keeps_its_traceback() -> None:
    with pytest.raises(AttributeError), refuse_failing_model("a/model", "Model"):
        raise AttributeError("ours")


@pytest.mark.parametrize("kind", ["led", "switch_transformers"])
def test_weights_that_rows_choose_are_not_partitioned(kind: str) -> None:
    """On two ranks gloo ended the process: one had gathered other weights than the other one at the same time."""
    model = AutoModelForSeq2SeqLM.from_config(small_config(kind))
    for stage, ranks in ((3, 1), (2, 2)):
        refuse_uneven_gathers(run_config(zero=ZeroConfig(stage=stage)), model, SimpleNamespace(size=ranks))
    with pytest.raises(UserError, match="wait for different weights"):
        refuse_uneven_gathers(run_config(zero=ZeroConfig(stage=3)), model, SimpleNamespace(size=2))
    longformer = AutoModelForSequenceClassification.from_config(
        small_config("longformer")
    )  # fills up tokens, and reads them once
    refuse_uneven_gathers(run_config(zero=ZeroConfig(stage=3)), longformer, SimpleNamespace(size=2))


@pytest.mark.parametrize(
    ("kind", "reason"), [("prophetnet", "states of 4 dimensions"), ("fsmt", "does not name the layer that projects")]
)
def test_a_projection_that_the_loss_cannot_stand_behind_is_refused(kind: str, reason: str) -> None:
    model = build(AutoModelForSeq2SeqLM, small_config(kind)).eval()
    with pytest.raises(UserError, match=reason):
        EncoderDecoderHead(model).examine(model, torch.device("cpu"))
