"""Tensors from config.json alone against models that transformers and peft build on the meta device, name by name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from dstune.core.errors import UserError
from dstune.methods._peft.config import AdapterConfig
from dstune.methods.ia3 import MODULES, Ia3Config
from dstune.methods.lora.config import LoraConfig
from dstune.methods.p_tuning import PTuningConfig, PTuningEncoder
from dstune.methods.prefix import PrefixConfig
from dstune.methods.prompt import PromptConfig
from dstune.methods.qlora.config import QloraConfig
from dstune.methods.vera import VeraConfig
from dstune.planning.adapters import low_rank
from dstune.planning.architecture import (
    CLASSIFIER,
    DEFAULTS,
    LANGUAGE_MODEL,
    TOKEN_CLASSIFIER,
    Architecture,
    architecture,
)
from dstune.protocols import method_of

DECODER = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 6, "moe_intermediate_size": 40}
V3 = {
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
T5 = {"vocab_size": 211, "d_model": 48, "d_ff": 80, "d_kv": 12, "num_layers": 3, "num_heads": 4}
BART = {
    "vocab_size": 211,
    "d_model": 48,
    **{
        f"{stack}_{key}": value
        for stack in ("encoder", "decoder")
        for key, value in (("layers", 2), ("ffn_dim", 80), ("attention_heads", 4))
    },
}

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", DECODER, LANGUAGE_MODEL),
    ("llama", DECODER | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, LANGUAGE_MODEL),
    ("llama", DECODER | {"head_dim": 16, "num_key_value_heads": 6}, CLASSIFIER),
    ("mistral", DECODER | {"head_dim": 16}, LANGUAGE_MODEL),
    ("qwen2", DECODER | {"tie_word_embeddings": True}, LANGUAGE_MODEL),
    ("qwen2", DECODER, TOKEN_CLASSIFIER),
    ("qwen3", DECODER, LANGUAGE_MODEL),
    ("gemma", DECODER, LANGUAGE_MODEL),
    ("gemma2", DECODER, LANGUAGE_MODEL),
    ("gemma3_text", DECODER, LANGUAGE_MODEL),
    ("smollm3", DECODER, LANGUAGE_MODEL),
    ("mixtral", DECODER | EXPERTS | {"num_local_experts": 4}, LANGUAGE_MODEL),
    ("qwen3_moe", DECODER | EXPERTS | QWEN_EXPERTS, LANGUAGE_MODEL),
    (
        "qwen3_moe",
        DECODER | EXPERTS | QWEN_EXPERTS | {"mlp_only_layers": [0], "decoder_sparse_step": 2},
        LANGUAGE_MODEL,
    ),
    ("bert", ENCODER, CLASSIFIER),
    ("bert", ENCODER, TOKEN_CLASSIFIER),
    ("roberta", ENCODER, CLASSIFIER),
    ("xlm-roberta", ENCODER, TOKEN_CLASSIFIER),
    ("deberta-v2", ENCODER | V3, CLASSIFIER),
    ("deberta-v2", ENCODER | V3 | {"share_att_key": False, "position_biased_input": True}, TOKEN_CLASSIFIER),
    ("modernbert", ENCODER, CLASSIFIER),
    ("t5", T5, LANGUAGE_MODEL),
    ("t5", T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2}, LANGUAGE_MODEL),
    ("bart", BART, LANGUAGE_MODEL),
]


def on_meta(kind: str, values: dict[str, Any], head: str) -> Any:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    config = AutoConfig.for_model(kind, **values, num_labels=5)
    language = AutoModelForSeq2SeqLM if kind in ("t5", "bart") else AutoModelForCausalLM
    classes = {
        LANGUAGE_MODEL: language,
        CLASSIFIER: AutoModelForSequenceClassification,
        TOKEN_CLASSIFIER: AutoModelForTokenClassification,
    }
    with torch.device("meta"):
        return classes[head].from_config(config)


def planned(kind: str, values: dict[str, Any], head: str) -> Architecture:
    return architecture({"model_type": kind, **values}, head, labels=5)


@pytest.mark.parametrize(("kind", "values", "head"), CASES)
def test_the_tensors_are_those_of_transformers(kind: str, values: dict[str, Any], head: str) -> None:
    model = on_meta(kind, values, head)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {tensor.name: tensor.shape for tensor in planned(kind, values, head).tensors}
    assert found == expected


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in CASES} - {"modernbert", "xlm-roberta"}))
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "query", "q"]])
def test_adapters_are_those_of_peft(kind: str, targets: list[str]) -> None:
    import peft

    _, values, head = next(case for case in CASES if case[0] == kind)
    model = on_meta(kind, values, head)
    if targets != ["all-linear"]:
        present = {name.split(".")[-1] for name, _ in model.named_modules()}
        targets = [target for target in targets if target in present]
        if not targets:
            pytest.skip("this architecture has none of them")
    settings = peft.LoraConfig(r=4, target_modules="all-linear" if targets == ["all-linear"] else targets)
    task = peft.TaskType.SEQ_CLS if head == CLASSIFIER else None
    settings.task_type = task
    adapted = peft.get_peft_model(model, settings)
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name
    }
    found = {tensor.name: tensor.shape for tensor in low_rank(planned(kind, values, head), targets, 4)}
    assert found == expected


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_what_config_json_may_leave_out_is_what_transformers_assumes(kind: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    for key, value in DEFAULTS[kind].items():
        if value is not None and hasattr(config, key):
            assert getattr(config, key) == value, key


def test_experts_are_counted_under_the_name_that_transformers_saves_them() -> None:
    from transformers import AutoConfig

    values = DECODER | EXPERTS | QWEN_EXPERTS
    saved = AutoConfig.for_model("qwen3_moe", **values).to_dict()
    assert "num_experts" not in saved or "num_local_experts" not in saved
    assert architecture(saved).parameters == planned("qwen3_moe", values, LANGUAGE_MODEL).parameters


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="mamba"):
        architecture(json.loads('{"model_type": "mamba"}'))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_size": -4096}, "hidden_size = -4096, which is less than 0"),
        ({"vocab_size": -5}, "vocab_size = -5, which is less than 0"),
        ({"hidden_size": 0}, "without width"),
        ({"vocab_size": 0}, "without vocabulary"),
        ({"num_hidden_layers": 0}, "without layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True, which is no whole number"),
        ({"num_hidden_layers": 32.5}, "num_hidden_layers = 32.5, which is no whole number"),
        ({"hidden_size": "4096"}, "hidden_size = 4096, which is no whole number"),
        ({"num_hidden_layers": 5_000}, "num_hidden_layers = 5000, which is more than 2,000"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused_by_their_keys(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        architecture(DECODER | {"model_type": "llama"} | values)


def test_patterns_of_ranks_and_magnitudes_are_those_of_peft() -> None:
    import peft

    model = on_meta("llama", DECODER, LANGUAGE_MODEL)
    patterns = {"q_proj": 2, r"layers.0.mlp.*": 6}
    settings = peft.LoraConfig(
        r=4, target_modules="all-linear", rank_pattern=patterns, use_dora=True, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, settings)
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name
    }
    method = LoraConfig(rank=4, rank_pattern=patterns, dora=True)
    assert {t.name: t.shape for t in method_of(method).added(planned("llama", DECODER, LANGUAGE_MODEL))} == expected
    assert {shape[0] for name, shape in expected.items() if "lora_A" in name} == {2, 4, 6}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (PromptConfig(virtual_tokens=5), {"peft_type": "PROMPT_TUNING"}),
        (PrefixConfig(virtual_tokens=5), {"peft_type": "PREFIX_TUNING"}),
        (
            PrefixConfig(virtual_tokens=5, projection_size=32),
            {"peft_type": "PREFIX_TUNING", "prefix_projection": True, "encoder_hidden_size": 32},
        ),
        (PTuningConfig(virtual_tokens=5, encoder_size=24), {"peft_type": "P_TUNING", "encoder_hidden_size": 24}),
        (
            PTuningConfig(virtual_tokens=5, encoder_size=24, encoder=PTuningEncoder.lstm, encoder_layers=3),
            {
                "peft_type": "P_TUNING",
                "encoder_hidden_size": 24,
                "encoder_reparameterization_type": "LSTM",
                "encoder_num_layers": 3,
            },
        ),
    ],
)
def test_trained_prompts_and_their_encoders_are_those_of_peft(method: AdapterConfig, settings: dict[str, Any]) -> None:
    import peft

    model = on_meta("llama", DECODER, LANGUAGE_MODEL)
    peft_config = peft.get_peft_config({"num_virtual_tokens": 5, "task_type": "CAUSAL_LM", **settings})
    adapted = peft.get_peft_model(model, peft_config)
    expected = {
        name.replace(".default", ""): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert {t.name: t.shape for t in method_of(method).added(planned("llama", DECODER, LANGUAGE_MODEL))} == expected


@pytest.mark.parametrize("kind", sorted(MODULES))
@pytest.mark.parametrize("method", [Ia3Config(), VeraConfig(rank=4)])
def test_vectors_are_those_of_peft(kind: str, method: AdapterConfig) -> None:
    import peft

    _, values, head = next(case for case in CASES if case[0] == kind)
    model = on_meta(kind, values, head)
    settings = (
        peft.IA3Config()
        if isinstance(method, Ia3Config)
        else peft.VeraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS" if head == CLASSIFIER else None)
    )
    adapted = peft.get_peft_model(model, settings)
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
        if ".ia3_l" in name or ".vera_lambda" in name
    }
    assert {tensor.name: tensor.shape for tensor in method_of(method).added(planned(kind, values, head))} == expected


@pytest.mark.parametrize(
    ("method", "where"),
    [
        (QloraConfig(), "method"),
        (LoraConfig(dropout=0.1), "method.dropout"),
        (LoraConfig(dora=True), "method.dora"),
        (LoraConfig(dropout=0.1, dora=True, target_modules=["q_proj", "v_proj"]), None),
        (LoraConfig(), None),
    ],
)
def test_what_experts_cannot_have_is_not_planned(method: AdapterConfig, where: str | None) -> None:
    mixtral = planned("mixtral", DECODER | EXPERTS | {"num_local_experts": 4}, LANGUAGE_MODEL)
    problem = method_of(method).architecture_problem(mixtral)
    assert (problem and problem.where) == where
    assert method_of(method).architecture_problem(planned("llama", DECODER, LANGUAGE_MODEL)) is None
