"""A model whose positions read later tokens is no chat model: its config.json says so, or a pass before the first step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.configs import run_config
from support.tiny import save_decoder, save_encoder, save_xlnet
from transformers import AutoModelForCausalLM

from dstune.config.schema import ModelConfig
from dstune.core.errors import UserError
from dstune.launch import preflight
from dstune.launch.preflight import description_problems, resolve_model
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.embedding.config import EmbeddingConfig
from dstune.tasks.preference.config import PreferenceConfig
from dstune.trainer.sanity_checks import refuse_sight_of_later_tokens


class PlainEngine:
    """What the check needs of an engine."""

    device = torch.device("cpu")

    def __init__(self, model: Any):
        self.module = self.forward = model

    def train(self, training: bool) -> None:
        self.module.train(training)


class OneRank:
    """A world without others to ask."""

    def any(self, condition: Any) -> bool:
        return bool(condition)


@pytest.mark.parametrize(
    ("values", "is_encoder"),
    [
        ({"model_type": "bert"}, True),
        ({"model_type": "xlm-roberta", "is_decoder": False}, True),
        ({"model_type": "modernbert"}, True),
        ({"model_type": "deberta-v2"}, True),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, True),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "all"}, True),
        ({"model_type": "llama", "is_causal": False}, True),
        ({"model_type": "bert", "is_decoder": True}, False),
        ({"model_type": "xlm", "causal": True}, False),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "vision"}, False),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": False}, False),
        ({"model_type": "llama"}, False),
    ],
)
def test_an_encoder_is_refused_by_its_config_json_for_tasks_that_write(tmp_path, values, is_encoder):
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = ModelConfig(path=str(tmp_path))
    for task in (None, PreferenceConfig()):
        run = run_config(model=model, **({"task": task} if task else {}))
        problems = [problem for problem in description_problems(tmp_path, model, run) if "encoder" in problem.reason]
        assert bool(problems) == is_encoder
        assert all("task=classification" in problem.fix and "model=" in problem.fix for problem in problems)
    for task in (ClassificationConfig(), EmbeddingConfig()):
        run = run_config(model=model, task=task)
        assert not any("encoder" in problem.reason for problem in description_problems(tmp_path, model, run))


def test_a_packaged_encoder_is_refused_before_any_rank_starts(monkeypatch):
    """`task=chat model=minilm`: the ranks would say that it has no chat template."""
    monkeypatch.setattr(preflight, "fetch_sample", lambda *arguments: None)
    monkeypatch.setattr(preflight, "whole_config_json", lambda model: {"model_type": "bert"})
    model = ModelConfig(path="sample://minilm")
    with pytest.raises(UserError, match="is an encoder"):
        resolve_model(model, lambda message: None, run_config(model=model))
    assert resolve_model(model, lambda message: None, run_config(model=model, task=ClassificationConfig())) == model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("save", "is_causal"), [(save_decoder, True), (save_encoder, False), (save_xlnet, False)])
def test_a_pass_before_the_first_step_shows_whether_a_position_reads_later_ones(tmp_path, save, is_causal, attention):
    if save is save_xlnet and attention == "sdpa":
        pytest.skip("install a release of transformers in which XLNet supports sdpa")
    model = AutoModelForCausalLM.from_pretrained(save(tmp_path), attn_implementation=attention).eval()
    run = run_config(model=ModelConfig(path=str(tmp_path)))
    arguments = (run, PlainEngine(model), model, None, OneRank())
    if is_causal:
        refuse_sight_of_later_tokens(*arguments)
        return
    with pytest.raises(UserError) as caught:
        refuse_sight_of_later_tokens(*arguments)
    (problem,) = caught.value.problems
    assert problem.where == "model.path" and "sdpa" not in problem.fix
