"""Models without a closed form: the planner's tensors against those that transformers makes of the same config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import save_tokenizer
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from architecture_cases import Case, model_class_of  # noqa: E402
from architecture_variants import VARIANTS  # noqa: E402
from tiny_architectures import build, small_config  # noqa: E402

from dstune.config.architectures import size_problems  # noqa: E402
from dstune.config.compose import compose  # noqa: E402
from dstune.core.errors import UserError  # noqa: E402
from dstune.models.inventory import inventory  # noqa: E402
from dstune.models.load import load_model, load_tokenizer  # noqa: E402
from dstune.models.unreached import find_unreached, is_within  # noqa: E402
from dstune.planning import counted  # noqa: E402
from dstune.planning.architecture import LANGUAGE_MODEL, Architecture, architecture_or_count, is_known  # noqa: E402
from dstune.planning.hardware import DEVICES, Cluster  # noqa: E402
from dstune.planning.stage import setup_on  # noqa: E402
from dstune.protocols import method_of  # noqa: E402

FEW = (
    "qwen3_5",
    "qwen3_5_moe",
    "gemma4",
    "ministral3",
    "gpt_oss",
    "glm4_moe",
    "deepseek_v3",
    "nemotron_h",
    "granitemoehybrid",
)


def save(kind: str, folder: Path) -> Any:
    """A tiny checkpoint of the class that a published one names."""
    name, _, variant = kind.partition("@")
    config = small_config(name, VARIANTS["causal"][kind] if variant else None)
    case = Case("causal", kind, "full", True, 3)
    model = build(model_class_of(case, config), config)
    if sum(parameter.numel() for parameter in model.parameters()) > 20_000_000:
        raise ValueError(f"{kind} is not tiny")
    model.save_pretrained(folder)
    return model


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Of the parameters that text reaches."""
    beside = find_unreached(model)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if not is_within(name, beside)}


def planned(folder: Path) -> Architecture:
    config = compose(["data.train=x.jsonl", f"model.path={folder}", "task=chat", "method=full", "zero=stage2"]).config
    return setup_on(config, Cluster(next(iter(DEVICES.values())), per_node=2, nodes=1))[2]


def test_a_plan_lists_the_tensors_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a child for all of them, and from the cache afterwards."""
    models = {kind: save(kind, tmp_path / kind) for kind in FEW}
    whole = [json.loads((tmp_path / kind / "config.json").read_text()) for kind in FEW]
    counted.count(whole, LANGUAGE_MODEL, 2)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was counted already"))
    for kind, model in models.items():
        found = planned(tmp_path / kind)
        assert found.is_counted and {t.name: t.shape for t in found.tensors} == shapes(model), kind
        assert found.parameters + (found.unreached or 0) == sum(p.numel() for p in model.parameters()), kind
        text = model.config.get_text_config()
        assert (found.hidden, found.vocabulary) == (text.hidden_size, text.vocab_size)
        assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.ci
def test_every_causal_architecture_is_planned_with_all_its_tensors(tmp_path: Path) -> None:
    models, differing = {}, []
    for kind in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS["causal"]):
        try:
            models[kind] = save(kind, tmp_path / kind)
        except Exception:  # the shrunk defaults of the class are no model
            continue
        if models[kind].config.is_encoder_decoder or kind == "bart":  # seq2seq builds another class of them
            del models[kind]
    whole = {kind: json.loads((tmp_path / kind / "config.json").read_text()) for kind in models}
    counted.count([values for values in whole.values() if not is_known(values)], LANGUAGE_MODEL, 2)
    for kind, model in models.items():
        text = whole[kind].get("text_config")
        values = text if isinstance(text, dict) and "hidden_size" in text else whole[kind]
        found = architecture_or_count(values, whole[kind], LANGUAGE_MODEL)
        expected = shapes(model)
        if {t.name for t in found.tensors} != set(expected) and not found.is_counted:
            # A closed form names the language model's tensors as its own class does.
            expected = {name: tuple(p.shape) for name, p in model.get_decoder().named_parameters()} | (
                {} if found.tied else {"lm_head": tuple(model.get_output_embeddings().weight.shape)}
            )
        if sorted(t.shape for t in found.tensors) != sorted(expected.values()):
            differing.append(kind)
    assert differing == []
    assert len(models) > 100 and set(VARIANTS["causal"]) <= set(models)


@pytest.mark.parametrize(
    "kind", ["glm4_moe", "minimax_m2", "nemotron_h", "llama4", "qwen3_5_moe", "gpt2", "deepseek_v4", "laguna", "phimoe"]
)
def test_adapters_of_a_counted_model_are_those_of_peft(tmp_path: Path, kind: str) -> None:
    """Experts under each of peft's patterns, a state space, and a head with another name."""
    save(kind, tmp_path)
    save_tokenizer(tmp_path)
    words = ["data.train=x.jsonl", f"model.path={tmp_path}", "method=lora", "method.rank=4", "trainer.precision=fp32"]
    config = compose(words).config
    method = method_of(config.method)
    adapted = method.apply(load_model(config, load_tokenizer(config.model), (), torch.float32), config)
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.numel()
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name
    }
    whole = json.loads((tmp_path / "config.json").read_text())
    added = method.added(counted.from_inventory(inventory(whole, LANGUAGE_MODEL, 2)))
    assert {tensor.name for tensor in added} == set(expected)
    assert sum(tensor.count for tensor in added) == sum(expected.values())


def test_what_linear_attention_and_experts_cost_is_known() -> None:
    values = json.loads(small_config("qwen3_5_moe").to_json_string(use_diff=False))
    found = counted.from_inventory(inventory(values, LANGUAGE_MODEL, 2))
    experts = [tensor for tensor in found.tensors if tensor.name.endswith("experts.gate_up_proj")]
    assert found.experts == 2 and {tensor.used for tensor in experts} == {0.5}  # two of four
    assert (found.window, found.windowed_layers) == (
        counted.LINEAR_CHUNK,
        values["text_config"]["layer_types"].count("linear_attention"),
    )
    assert found.unreached


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "unheard-of", "hidden_size": 8}, "unheard-of"),
        ({"hidden_size": 8}, "no model_type"),
        ({"model_type": ["llama"]}, "a model_type that is no name"),
        ({"model_type": "qwen3_next", "hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_transformers_cannot_build_is_refused(
    values: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(configs: Any, head: str, labels: int) -> list[dict[str, Any]]:
        try:
            return [inventory(configs[0], head, labels)]
        except Exception as error:
            return [{"error": f"{type(error).__name__}: {error}"}]

    monkeypatch.setattr(counted, "_ask", child)
    with pytest.raises(UserError, match=reason):
        architecture_or_count(values, values, LANGUAGE_MODEL)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 9_999, "num_experts": 9_999},
        {"vision_config": {"depth": 10**8}},
        {"num_experts": 10**7},
        {"num_hidden_layers": "many"},
        {"layer_types": ["linear_attention"] * 10_000},
        {"hybrid_override_pattern": "M" * 10_000},
    ],
    ids=lambda values: str(values)[:40],
)
def test_a_config_json_that_would_never_end_reaches_no_child(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counted, "_ask", lambda *_: pytest.fail("it was asked"))
    whole = {"model_type": "qwen3_next"} | values
    with pytest.raises(UserError, match=r"num_hidden_layers|depth|num_experts|layer_types|pattern"):
        architecture_or_count(whole, whole, LANGUAGE_MODEL)


def test_no_architecture_of_transformers_is_beyond_the_limits() -> None:
    """Gemma 3n and 4 have a second vocabulary, whose key has `layer` in its name."""
    beyond = {}
    for kind in CONFIG_MAPPING:
        try:
            values = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
        except Exception:  # a part has no default, or needs a package
            continue
        if problems := size_problems(values):
            beyond[kind] = problems[0].reason
    assert beyond == {"vilt": "its config.json has num_images = -1, which is less than 0"}  # which reads no text alone


def test_a_size_that_config_json_leaves_out_is_the_one_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published Gemma 3 4B has no numbers of heads; other models leave out other sizes."""
    monkeypatch.setattr(counted, "_ask", lambda configs, head, labels: [inventory(configs[0], head, labels)])
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path))
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    assert architecture_or_count(text, text, LANGUAGE_MODEL).parameters == 3_880_263_168
    small = {"model_type": "qwen2", "vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 8, "hidden_size": 64}
    assert architecture_or_count(small, small).heads == 32  # transformers' default
    with pytest.raises(UserError, match="has no num_hidden_layers"):
        architecture_or_count({"model_type": "llama"}, {"model_type": "llama"})


def test_a_child_that_dies_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.CompletedProcess([], 1, stdout="", stderr="Killed")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: dead)
    with pytest.raises(UserError, match="Killed"):
        counted.count([{"model_type": "mamba2"}], LANGUAGE_MODEL, 2)


def test_a_failure_of_counting_is_no_answer_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package may be there the next time; what was counted is asked for once."""
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path))
    answers = iter([[{"error": "ImportError: timm"}, {"class": "A"}], [{"class": "B"}]])
    monkeypatch.setattr(counted, "_ask", lambda *_: next(answers))
    models = [{"model_type": "b"}, {"model_type": "a"}]
    assert counted.count(models, LANGUAGE_MODEL, 2) == [{"error": "ImportError: timm"}, {"class": "A"}]
    assert counted.count(models, LANGUAGE_MODEL, 2) == [{"class": "B"}, {"class": "A"}]
    assert counted.count(models, LANGUAGE_MODEL, 2) == [{"class": "B"}, {"class": "A"}]
