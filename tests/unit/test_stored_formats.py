"""Bases that are stored in few bits: which are trained from, and what is said of the others before a download."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.few_bits import compressed, in_fp8, in_int4, in_nvfp4, store_each, store_in_fp8, store_in_mxfp4
from support.tiny import save_decoder, save_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from dstune.checkpoint import store
from dstune.checkpoint.export import export_checkpoint
from dstune.checkpoint.model_folder import refuse_rounded_base
from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.config.stored_formats import describe_stored_format, stored_format, stored_format_problem
from dstune.core.errors import UserError
from dstune.launch import plan
from dstune.launch.preflight import description_problems, resolve_model
from dstune.models.load import load_model, load_tokenizer
from dstune.protocols import method_of

FULL, LORA, QLORA = (
    method_of(compose(["model.path=x", "data.train=x.jsonl", f"method={name}"]).config.method)
    for name in ("full", "lora", "qlora")
)


def described(**settings: Any) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": settings}


def grouped(*changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with a group of layers for each of `changes`."""
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    groups = {f"group_{n}": {"targets": ["Linear"], "weights": scheme | change} for n, change in enumerate(changes)}
    return {"format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    ("values", "name", "obstacle"),
    [
        (described(quant_method="fp8", weight_block_size=[128, 128]), "FP8", ""),
        (described(quant_method="mxfp4"), "MXFP4", ""),
        ({"text_config": described(quant_method="compressed-tensors", format="pack-quantized")}, "4-bit integers", ""),
        (described(quant_method="compressed-tensors", format="nvfp4-pack-quantized"), "NVFP4", ""),
        (described(quant_method="compressed-tensors", format="own"), "own", "format own"),
        (described(quant_method="modelopt", quant_algo="NVFP4"), "NVFP4 of ModelOpt", "no reader"),
        (
            described(quant_method="compressed-tensors", **grouped({"actorder": "group"})),
            "4-bit integers",
            "no longer read",
        ),
        (
            described(quant_method="compressed-tensors", **grouped({}, {"num_bits": 8})),
            "4-bit integers",
            "as the first",
        ),
        (described(quant_method="compressed-tensors", **grouped({}, {})), "4-bit integers", ""),
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
    problem = stored_format_problem(values, "some/model", LORA)
    assert (problem is not None) == bool(obstacle)


def test_plain_weights_and_those_of_bitsandbytes_are_no_case_of_it() -> None:
    assert stored_format({"model_type": "llama"}) is None
    assert stored_format(described(quant_method="bitsandbytes", load_in_4bit=True)) is None


@pytest.mark.parametrize(
    ("settings", "bits", "fix"), [({"load_in_4bit": True}, 4, "qlora"), ({"load_in_8bit": True}, 8, "lora")]
)
def test_weights_of_bitsandbytes_take_adapters_alone(settings: dict[str, bool], bits: int, fix: str) -> None:
    values = described(quant_method="bitsandbytes", **settings)
    assert describe_stored_format(values) == f"its weights are stored in {bits} bits by bitsandbytes, and stay so"
    problem = stored_format_problem(values, "x", FULL)
    assert problem is not None and (problem.where, problem.value) == ("method", "full")
    assert problem.fix.startswith(f"method={fix},")
    assert stored_format_problem(values, "x", LORA) is None and stored_format_problem(values, "x", QLORA) is None


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    config = compose([f"model.path={tmp_path}", "data.train=x.jsonl", "method=lora"]).config
    reasons = [problem.reason for problem in description_problems(tmp_path, config.model, config)]
    assert any("stored in FP8 of ModelOpt" in reason for reason in reasons)
    with pytest.raises(UserError, match="FP8 of ModelOpt"):
        plan.main([f"model.path={tmp_path}", "data.train=x.jsonl", "method=lora"])


def test_a_method_that_rounds_weights_needs_whole_ones() -> None:
    problem = stored_format_problem(described(quant_method="mxfp4"), "x", QLORA)
    assert problem is not None and (problem.where, problem.value) == ("method", "qlora")


def test_the_extra_is_named_where_its_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = stored_format_problem(described(quant_method="fp8"), "x", LORA)
    assert problem is not None and "accelerate" in problem.reason and ".[quantized]" in problem.fix


def test_a_run_is_refused_by_the_description_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described(quant_method="gptq")))
    config = compose([f"model.path={tmp_path}", "data.train=x.jsonl", "method=lora"]).config
    reasons = [problem.reason for problem in description_problems(tmp_path, config.model, config)]
    assert any("stored in GPTQ" in reason for reason in reasons)
    assert not any("GPTQ" in problem.reason for problem in description_problems(tmp_path, config.model))


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
STORED = {
    "fp8": store_in_fp8,
    "fp8-uneven": partial(store_in_fp8, block=24),  # rows are 32, 64 and 16
    "fp8-auto": partial(store_each, store=in_fp8, settings={"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-compressed": partial(store_each, store=in_fp8, settings=compressed("float-quantized", **FP8)),
    "int4": partial(store_each, store=in_int4, settings=compressed("pack-quantized", **INT4)),
    "nvfp4": partial(store_each, store=in_nvfp4, settings=compressed("nvfp4-pack-quantized", **NVFP4)),
    "mxfp4": store_in_mxfp4,
}


@pytest.mark.parametrize("kind", STORED)
def test_weights_are_loaded_as_the_values_they_stand_for(tmp_path: Path, kind: str) -> None:
    if kind == "mxfp4":
        from tiny_architectures import build, small_config
        from transformers import AutoModelForCausalLM

        config = small_config("gpt_oss")
        config.intermediate_size = 64
        build(AutoModelForCausalLM, config).save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
    else:
        save_decoder(tmp_path)
    values = STORED[kind](tmp_path)
    run = compose([f"model.path={tmp_path}", "data.train=x.jsonl", "trainer.precision=fp32"]).config
    said: list[str] = []
    resolve_model(run.model, said.append, run)
    assert any("its weights are stored in" in text and "dequantized" in text for text in said)
    model = load_model(run, load_tokenizer(run.model), (), torch.float32)
    loaded = dict(model.named_parameters())
    assert values.keys() == loaded.keys() and all(parameter.requires_grad for parameter in loaded.values())
    assert not hasattr(model.config, "quantization_config")
    for name, value in values.items():
        if kind == "nvfp4":  # compressed-tensors computes these in bf16
            torch.testing.assert_close(loaded[name].data, value, rtol=2.0**-7, atol=0)
        else:
            assert torch.equal(loaded[name], value), name


def test_scales_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    save_decoder(tmp_path)
    store_each(tmp_path, in_fp8, None)
    run = compose([f"model.path={tmp_path}", "data.train=x.jsonl"]).config
    with pytest.raises(
        UserError, match=r"does not read their scales \(model.layers.0.mlp.down_proj.weight_scale and 13 more\)"
    ):
        load_model(run, load_tokenizer(run.model), (), torch.float32)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_an_adapter_is_merged_into_the_values_that_the_files_stand_for(tmp_path: Path, kind: str) -> None:
    """And no scale is left beside the sums, which have the full width."""
    save_decoder(tmp_path / "base")
    values = STORED[kind](tmp_path / "base")
    run = compose([f"model.path={tmp_path / 'base'}", "data.train=x.jsonl", "task=causal_lm", "method=lora"])
    config = run.config
    model = load_model(config, load_tokenizer(config.model), (), torch.float32)
    adapted = method_of(config.method).apply(model, config)
    trained = {name: torch.randn_like(weight) for name, weight in adapted.named_parameters() if weight.requires_grad}
    write_run(tmp_path / "run.yaml", run)
    written = store.folder(tmp_path) / f"{store.tag(1)}.incomplete"
    written.mkdir(parents=True)
    torch.save({"module": trained, "buffer_names": [], "global_steps": 1}, written / "mp_rank_00_model_states.pt")
    checkpoint = store.commit(written, {"step": 1, "labels": [], "best": None})
    merged = load_file(export_checkpoint(tmp_path, checkpoint, tmp_path / "out", merge=True) / "model.safetensors")
    assert merged.keys() == values.keys()
    scale = adapted.peft_config["default"].lora_alpha / adapted.peft_config["default"].r
    for name, value in values.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_B.default.weight" in trained:
            value = (
                value + scale * trained[f"{layer}.lora_B.default.weight"] @ trained[f"{layer}.lora_A.default.weight"]
            )
        torch.testing.assert_close(merged[name], value, msg=name)
    assert any(not torch.equal(merged[name], value) for name, value in values.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_nothing_is_merged_into_weights_of_bitsandbytes(tmp_path: Path) -> None:
    save_decoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(UserError, match="are stored in 4 bits by bitsandbytes, and no adapter"):
        refuse_rounded_base(compose([f"model.path={tmp_path}", "data.train=x.jsonl"]).config.model)
