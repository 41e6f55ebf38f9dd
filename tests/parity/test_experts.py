"""Mixtures of experts train as a plain torch loop does, adapters on their stacked weights too, and export as what they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity.reference import train_plainly
from parity.test_ladder import PROGRAM, Workshop, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.ranks import run_ranks

from dstune.checkpoint.export import export_checkpoint
from dstune.checkpoint.serving import vllm_problems
from dstune.checkpoint.store import newest
from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.methods.lora.apply import experts_without_adapters, layers_without_adapters
from dstune.methods.qlora.quantize import refuse_experts
from dstune.protocols import method_of

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

STILL = "model.config_overrides={attention_dropout:0.0}"
KINDS = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 8, "mlp_only_layers": [0]},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
}
"""Four experts, of which two are asked for a token; the first layer of the Qwen has none."""


def save_experts(kind: str, decoder: Path, folder: Path) -> Path:
    """A model with experts, and what else the tiny decoder has."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    known = json.loads((decoder / "config.json").read_text())
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    settings = {key: known[key] for key in (*same, "initializer_range")} | {"num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | KINDS[kind]))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(workshop: Workshop):  # noqa: F811
    return {kind: save_experts(kind, workshop.model, workshop.folder / kind) for kind in KINDS}


def one_by_one(path, **settings):
    """The reference computes expert by expert: the product of groups is there in the narrower formats only."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **settings, experts_implementation="eager")


@pytest.mark.parametrize(
    ("kind", "stages"), [("qwen3_moe", (2, 3)), pytest.param("mixtral", (0, 1, 2, 3), marks=pytest.mark.ci)]
)
def test_all_weights_equal_the_plain_loop(workshop, models, kind, stages):  # noqa: F811
    from transformers import AutoModelForCausalLM

    common = [f"model.path={models[kind]}", "data.packing=true", STILL]
    reference = SimpleNamespace(from_pretrained=one_by_one)
    expected = train_plainly(workshop.composed("reference", *common).config, workshop.folder / "cache", reference)
    names = {stage: f"{kind}-s{stage}" for stage in stages}
    run_ranks(PROGRAM, 2, [workshop.case(name, f"zero=stage{stage}", *common) for stage, name in names.items()])
    for name in names.values():
        rows = workshop.rows(name)
        assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-6), name
        assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norms, rel=1e-6), name
        trained = dict(AutoModelForCausalLM.from_pretrained(workshop.folder / name / "export").named_parameters())
        assert any(".experts." in key for key in expected.weights)
        for key, weight in expected.weights.items():
            assert (trained[key] - weight).abs().max() < 1e-6, f"{name}: {key}"


@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.ci)])
def test_adapters_of_experts(workshop, models, kind):  # noqa: F811
    """On two ranks as on one, where ZeRO-3 has the experts in parts; exported as an adapter, and merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = [f"model.path={models[kind]}", "method=lora", "optimizer.lr=2", STILL, "evaluate.at_start=true"]
    common = [*lora, "trainer.max_steps=3", "data.packing=true"]
    alone, shared = f"{kind}-alone", f"{kind}-shared"
    run_ranks(PROGRAM, 1, [workshop.case(alone, *common, "zero=stage0")])
    cases = [workshop.case(f"{shared}-{stage}", *common, f"zero=stage{stage}") for stage in (2, 3)]
    run_ranks(PROGRAM, 2, cases)
    for name in (f"{shared}-2", f"{shared}-3"):
        for key in ("loss", "grad_norm"):
            values = [[row[key] for row in workshop.rows(each)] for each in (alone, name)]
            assert values[1] == pytest.approx(values[0], rel=1e-5), (name, key)
            assert abs(values[0][2] - values[0][0]) > 1e-2, "three steps change it"
        ends = [workshop.result(each)["eval_final"]["loss"] for each in (alone, name)]
        assert ends[1] == pytest.approx(ends[0], rel=1e-5)
    run = workshop.folder / f"{shared}-3"
    merged = export_checkpoint(run, newest(run), run / "merged", merge=True)
    tokens = torch.arange(4, 36)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(models[kind])
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, run / "export")(tokens).logits
        whole = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
    assert (adapted - before).abs().max() > 0.1
    assert (whole - adapted).abs().max() < 1e-4
    assert vllm_problems(run / "export") == ["adapters of stacked experts are not served"]
    assert vllm_problems(merged) == []


# -- stacked weights that are named ---------------------------------------------------------------------------------------

STACKED = ["experts.down_proj", "experts.gate_up_proj"]


@pytest.fixture(scope="module")
def gpt_oss(workshop: Workshop) -> Path:  # noqa: F811
    from tiny_architectures import build, small_config
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = workshop.folder / "gpt_oss"
    build(AutoModelForCausalLM, small_config("gpt_oss")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(workshop.model).save_pretrained(folder)
    return folder


def adapted_plainly(path: Path, **settings):
    """peft alone, its first values drawn as a run draws them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    slow = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(path, **settings | slow)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], target_parameters=STACKED)
    return get_peft_model(model, lora, autocast_adapter_dtype=False).double()


@pytest.mark.ci
def test_adapters_of_named_weights_equal_plain_peft(workshop, gpt_oss):  # noqa: F811
    """gpt-oss, whose experts peft does not know by itself, on two ranks at every stage; served under the names of peft."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    lora = ["method=lora", "method.rank=4", "method.target_modules=[q_proj,v_proj]"]
    common = [f"model.path={gpt_oss}", *lora, f"method.target_parameters=[{','.join(STACKED)}]", "data.packing=false"]
    common += [STILL, "trainer.seed=0", "optimizer.lr=0.2", "trainer.max_steps=3"]
    reference = SimpleNamespace(from_pretrained=adapted_plainly)
    expected = train_plainly(workshop.composed("reference", *common).config, workshop.folder / "cache", reference)
    names = {stage: f"stacked-{stage}" for stage in range(4)}
    run_ranks(PROGRAM, 2, [workshop.case(name, f"zero=stage{stage}", *common) for stage, name in names.items()])
    for name in names.values():
        rows = workshop.rows(name)
        assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-6), name
        assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norms, rel=1e-5), name
        trained = load_file(workshop.folder / name / "export" / "adapter_model.safetensors")
        theirs = {key.replace(".default", ""): weight for key, weight in expected.weights.items() if ".lora_" in key}
        assert trained.keys() == theirs.keys() and any("experts.base_layer.lora_A" in key for key in trained)
        for key, weight in theirs.items():
            assert (trained[key] - weight).abs().max() < 1e-5, f"{name}: {key}"
    run, tokens = workshop.folder / "stacked-3", torch.arange(4, 36)[None]
    assert vllm_problems(run / "export") == []
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(gpt_oss, attn_implementation="eager")
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, run / "export")(tokens).logits
    assert (adapted - before).abs().max() > 1e-5


def test_an_adapter_of_named_weights_is_continued(gpt_oss, tmp_path):
    from transformers import AutoModelForCausalLM

    def adapted(*words: str):
        named = [f"model.path={gpt_oss}", "data.train=x", "method=lora", "method.target_modules=[q_proj]", *words]
        config = resolved_method(compose(named).config)
        return method_of(config.method).apply(AutoModelForCausalLM.from_pretrained(gpt_oss), config)

    first = adapted(f"method.target_parameters=[{','.join(STACKED)}]")
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            parameter += 0.01 if ".lora_B." in name else 0.0
    first.save_pretrained(tmp_path)
    second = dict(adapted(f"method.adapter={tmp_path}").named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(second[name], parameter), name
    with pytest.raises(UserError, match=r"no weight of the model ends so(.|\n)*experts.gate_up_proj"):
        adapted("method.target_parameters=[experts.w1]")


def resolved_method(config):
    from dataclasses import replace

    return replace(config, method=method_of(config.method).resolve())


@pytest.mark.parametrize(
    "requested", ["method.dropout=0.1", "method.dora=true", "method.init=pissa", "method.frozen_adapters=[x]"]
)
def test_what_named_weights_cannot_have_is_refused(requested):
    words = ["model.path=x", "data.train=x", "method=lora", "method.target_parameters=[experts.down_proj]", requested]
    problems = list(method_of((config := compose(words).config).method).check(config))
    assert [problem.where for problem in problems] == [requested.partition("=")[0]]


def test_layers_beside_experts_without_adapters_are_named():
    """peft takes `gate_proj` for the experts' where a model has experts, so dense layers and shared experts get none."""
    from tiny_architectures import build, small_config
    from transformers import AutoModelForCausalLM

    config = small_config("glm4_moe")
    config.first_k_dense_replace, config.n_shared_experts = 1, 1
    model = build(AutoModelForCausalLM, config)
    run = compose(["model.path=x", "data.train=x", "method=lora"]).config
    bare = layers_without_adapters(method_of(run.method).apply(model, run))
    last = config.num_hidden_layers - 1
    assert {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")} <= bare.keys()
    assert f"model.layers.{last}.mlp.shared_experts.down_proj" in bare
    assert not any("self_attn" in name or "lm_head" in name for name in bare)


def test_adapters_whose_matrices_have_several_scales_are_not_served(tmp_path):
    from safetensors.torch import save_file

    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 8}}
    save_file({"x.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    for alphas, served in (({}, False), ({"q_proj": 16}, True)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": alphas}))
        assert (vllm_problems(tmp_path) == []) is served


@pytest.mark.parametrize("override", ["method.dropout=0.1", "method.dora=true"])
def test_what_experts_cannot_have_is_named(models, override):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["qwen3_moe"])
    config = compose([f"model.path={models['qwen3_moe']}", "data.train=x", "method=lora", override]).config
    with pytest.raises(UserError, match="stacked weights") as refused:
        method_of(config.method).apply(model, config)
    (problem,) = refused.value.problems
    assert f"{problem.where}={problem.value}" == override and "target_modules" in problem.fix


@pytest.mark.parametrize(("targets", "bare"), [("all-linear", False), ("q_proj", True)])
def test_experts_without_adapters_are_noticed(models, targets, bare):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["qwen3_moe"])
    words = [f"model.path={models['qwen3_moe']}", "data.train=x", "method=lora", f"method.target_modules=[{targets}]"]
    config = compose(words).config
    share = experts_without_adapters(method_of(config.method).apply(model, config))
    assert (0.1 < share < 0.9) if bare else share == 0


def test_experts_are_not_rounded_to_4_bits(models):
    from transformers import AutoModelForCausalLM

    with pytest.raises(UserError, match=r"experts, \d+% of this model's weights"):
        refuse_experts(AutoModelForCausalLM.from_pretrained(models["mixtral"]))
