"""Layers of architectures whose modules have other names and another order; what `method=freeze` makes of them."""

from __future__ import annotations

import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from dstune.core.errors import UserError
from dstune.methods.freeze.apply import freeze_parts
from dstune.methods.freeze.config import FreezeConfig
from dstune.models.layers import decayed_rates, layers_of

USUAL = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
LLAMA = {**USUAL, "num_key_value_heads": 2}
BERT = BertForSequenceClassification, BertConfig(**USUAL)
CASES = [
    (*BERT, 5, [16] * 3, "classifier.bias"),
    (LlamaForCausalLM, LlamaConfig(**LLAMA), 1, [9] * 3, "lm_head.weight"),
    (LlamaForCausalLM, LlamaConfig(**LLAMA, tie_word_embeddings=True), 1, [9] * 3, "model.norm.weight"),
    (MixtralForCausalLM, MixtralConfig(**LLAMA), 1, [9] * 3, "lm_head.weight"),
    (ModernBertForSequenceClassification, ModernBertConfig(**USUAL, pad_token_id=0), 2, [5, 6, 6], "classifier.bias"),
    (GPT2LMHeadModel, GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=50), 2, [12] * 3, "transformer.ln_f.bias"),
    (
        DistilBertForSequenceClassification,
        DistilBertConfig(dim=8, hidden_dim=16, n_layers=3, n_heads=2, vocab_size=50),
        4,
        [16] * 3,
        "classifier.bias",
    ),
    (
        T5ForConditionalGeneration,
        T5Config(d_model=8, d_ff=16, num_layers=2, num_heads=2, d_kv=4, vocab_size=50),
        1,
        [9, 8, 14, 13],
        "decoder.final_layer_norm.weight",
    ),
]


@pytest.mark.parametrize(("model_class", "config", "embeddings", "blocks", "last"), CASES)
def test_layers(model_class, config, embeddings, blocks, last):
    model = model_class(config)
    layers = layers_of(model)
    assert len(layers.embeddings) == embeddings
    assert [len(block) for block in layers.blocks] == blocks
    assert layers.top[-1] == last
    everything = [name for part in layers.parts for name in part]
    assert sorted(everything) == sorted(name for name, _ in model.named_parameters())


def test_rates_fall_from_the_top():
    layers = layers_of(BERT[0](BERT[1]))
    rates = decayed_rates(layers, 0.5)
    found = [rates[part[0]] for part in layers.parts]
    assert found == [0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]


def frozen(**keys) -> set[str]:
    model = BERT[0](BERT[1])
    freeze_parts(model, FreezeConfig(**keys))
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_freeze_by_layers_names_and_exceptions():
    layers = layers_of(BERT[0](BERT[1]))
    assert frozen(embeddings=True, first_layers=1) == {*layers.embeddings, *layers.blocks[0]}
    assert frozen(last_layers=2) == {*layers.blocks[1], *layers.blocks[2]}
    biases = {name for name in layers.blocks[0] if name.endswith("bias")}
    assert frozen(first_layers=1, trained=["bias$"]) == set(layers.blocks[0]) - biases
    assert frozen(parameters=[r"layer\.1\.output"]) == {name for name in layers.blocks[1] if ".1.output." in name}


@pytest.mark.parametrize(
    ("keys", "where", "reason"),
    [
        ({"first_layers": 4}, "method.first_layers", "the model has 3 layers"),
        ({"parameters": ["mlp"]}, "method.parameters", "no parameter has a name like that"),
        ({"parameters": ["."]}, "method", "nothing is left to be trained"),
        ({"first_layers": 1, "trained": ["."]}, "method.trained", "nothing of the model would be frozen"),
    ],
)
def test_freeze_refuses_what_the_model_does_not_have(keys, where, reason):
    with pytest.raises(UserError) as caught:
        frozen(**keys)
    (problem,) = caught.value.problems
    assert problem.where == where and problem.reason.startswith(reason)
