"""Bases that are stored in few bits: which are trained from, and what is said of the others before a download."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.few_bits import store_in_fp8, store_in_mxfp4
from support.tiny import save_decoder, save_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from dstune.config.compose import compose
from dstune.config.stored_formats import stored_format, stored_format_problem
from dstune.launch.preflight import description_problems, resolve_model
from dstune.models.load import load_model, load_tokenizer


def described(**settings: Any) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": settings}


@pytest.mark.parametrize(
    ("values", "name", "obstacle"),
    [
        (described(quant_method="fp8", weight_block_size=[128, 128]), "FP8", ""),
        (described(quant_method="mxfp4"), "MXFP4", ""),
        ({"text_config": described(quant_method="compressed-tensors", format="pack-quantized")}, "4-bit integers", ""),
        (described(quant_method="compressed-tensors", format="nvfp4-pack-quantized"), "NVFP4", ""),
        (described(quant_method="compressed-tensors", format="own"), "own", "format own"),
        (described(quant_method="modelopt", quant_algo="NVFP4"), "NVFP4 of ModelOpt", "no reader"),
        (described(quant_method="gptq", bits=4), "GPTQ", "gradients cannot pass"),
        (described(quant_method="awq"), "AWQ", "gradients cannot pass"),
        (described(group_size=64, bits=4), "MLX", "only MLX"),
        ({"quantization": {"bits": 4}}, "MLX", "only MLX"),
    ],
)
def test_what_a_config_json_says_of_its_weights(values: dict[str, Any], name: str, obstacle: str) -> None:
    stored = stored_format(values)
    assert stored is not None and stored.name == name
    assert obstacle in stored.obstacle and bool(obstacle) == bool(stored.obstacle)
    problem = stored_format_problem(values, "some/model", quantizes=False)
    assert (problem is not None) == bool(obstacle)


def test_plain_weights_and_those_of_bitsandbytes_are_no_case_of_it() -> None:
    assert stored_format({"model_type": "llama"}) is None
    assert stored_format(described(quant_method="bitsandbytes", load_in_4bit=True)) is None


def test_a_method_that_rounds_weights_needs_whole_ones() -> None:
    problem = stored_format_problem(described(quant_method="mxfp4"), "x", quantizes=True)
    assert problem is not None and (problem.where, problem.value) == ("method", "qlora")


def test_the_extra_is_named_where_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = stored_format_problem(described(quant_method="fp8"), "x", quantizes=False)
    assert problem is not None and "accelerate" in problem.reason and ".[quantized]" in problem.fix


def test_a_run_is_refused_by_the_description_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described(quant_method="gptq")))
    config = compose([f"model.path={tmp_path}", "data.train=x.jsonl", "method=lora"]).config
    reasons = [problem.reason for problem in description_problems(tmp_path, config.model, config)]
    assert any("stored in GPTQ" in reason for reason in reasons)
    assert not any("GPTQ" in problem.reason for problem in description_problems(tmp_path, config.model))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_weights_are_loaded_as_the_values_they_stand_for(tmp_path: Path, kind: str) -> None:
    if kind == "fp8":
        save_decoder(tmp_path)
        values = store_in_fp8(tmp_path)
    else:
        from tiny_architectures import build, small_config
        from transformers import AutoModelForCausalLM

        config = small_config("gpt_oss")
        config.intermediate_size = 64
        build(AutoModelForCausalLM, config).save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        values = store_in_mxfp4(tmp_path)
    run = compose([f"model.path={tmp_path}", "data.train=x.jsonl", "trainer.precision=fp32"]).config
    said: list[str] = []
    resolve_model(run.model, said.append, run)
    assert any(f"stored in {kind.upper()}" in text for text in said)
    model = load_model(run, load_tokenizer(run.model), (), torch.float32)
    loaded = dict(model.named_parameters())
    assert values.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) and loaded[name].requires_grad for name, value in values.items())
    assert not hasattr(model.config, "quantization_config")
