"""Embeddings of a loaded model that cannot be trained right."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.tiny import save_decoder, save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    IBertConfig,
    IBertForSequenceClassification,
    LagunaConfig,
    LagunaForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)
from transformers.core_model_loading import Split

from dstune.config.compose import compose
from dstune.core.errors import UserError
from dstune.models.base_weights import Loading
from dstune.models.load import _refuse_erased_padding, initialize_weights, load_model, load_tokenizer
from dstune.models.partitioned_loading import corrected_partitioned_loading
from dstune.models.peft_load import load_peft_adapter
from dstune.protocols import method_of


@pytest.mark.parametrize(
    ("tied", "method", "refused"), [(True, "full", True), (True, "lora", False), (False, "full", False)]
)
def test_an_erased_row_is_refused_where_it_is_trained(tmp_path: Path, tied: bool, method: str, refused: bool) -> None:
    """As transformers 5.24 loads Youtu: the row of the padding token is zero, and its file holds another one."""
    save_decoder(tmp_path, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    row = model.get_input_embeddings().weight[2]
    config = compose([f"model.path={tmp_path}", "data=chitchat", f"method={method}"]).config
    with torch.no_grad():
        row.fill_(1)
        model.save_pretrained(tmp_path)
        _refuse_erased_padding(config, model)
        row.zero_()
    if not refused:
        _refuse_erased_padding(config, model)
        return
    with pytest.raises(UserError, match="sets the embedding of its padding token to zero"):
        _refuse_erased_padding(config, model)


def test_a_table_that_cannot_grow_is_refused_where_it_would_have_to(tmp_path: Path) -> None:
    config = IBertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=2,
    )
    IBertForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    base = [f"model.path={tmp_path}", "data=files", "data.train=rows.jsonl", "task=classification"]
    run = compose(base).config
    tokenizer = load_tokenizer(run.model)
    assert len(load_model(run, tokenizer, ("left", "right"), torch.float32).get_input_embeddings().weight) == 128
    tokenizer.add_tokens([f"new{number}" for number in range(64)])
    with pytest.raises(UserError, match="QuantEmbedding of IBertForSequenceClassification has 128 and cannot grow"):
        load_model(run, tokenizer, ("left", "right"), torch.float32)


def test_new_weights_are_drawn_by_the_part_of_the_model_that_they_belong_to() -> None:
    """Each part has its own `initializer_range`. The whole of Qwen 3.5 MoE cannot initialize the experts of its text."""
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "initializer_range": 0.5,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "initializer_range": 0.01,
    }
    model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    initialize_weights(model, [name for name, _ in model.named_parameters()], seed=0)
    layer, block = model.model.language_model.layers[0], model.model.visual.blocks[0]
    for weight, spread in [
        (layer.mlp.experts.down_proj, 0.5),
        (layer.self_attn.q_proj.weight, 0.5),
        (model.lm_head.weight, 0.5),
        (block.attn.qkv.weight, 0.01),
    ]:
        assert weight.std().item() == pytest.approx(spread, rel=0.1)


def test_a_layer_named_like_a_head_is_trained_whole_and_gets_no_adapter(tmp_path: Path) -> None:
    """DistilBERT has a `pre_classifier` before its `classifier`."""
    config = DistilBertConfig(vocab_size=128, dim=32, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=64)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    words = [f"model.path={tmp_path}", "data=files", "data.train=rows.jsonl", "task=classification", "method=lora"]
    run = compose(words).config
    model = method_of(run.method).apply(
        load_model(run, load_tokenizer(run.model), ("left", "right"), torch.float32), run
    )
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for head in ("pre_classifier", "classifier"):
        assert any(f".{head}.modules_to_save." in name for name in trained), head
        assert not any(f".{head}." in name and "lora_" in name for name in trained), head
    assert any(".q_lin." in name and "lora_" in name for name in trained)


def test_adapters_that_peft_could_not_load_again_are_refused(tmp_path: Path) -> None:
    """transformers 5.24 renames `mlp.shared_expert.` of Laguna's files by a pattern that `mlp.shared_experts` matches too."""
    config = LagunaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 2,
        mlp_layer_types=["dense", "sparse"],
        num_attention_heads_per_layer=[4, 4],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    LagunaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    words = [f"model.path={tmp_path}", "data=chitchat", "method=lora", "method.target_modules="]

    def adapted(modules: str) -> set[str]:
        run = compose([*words[:-1], words[-1] + modules]).config
        module = method_of(run.method).apply(load_model(run, load_tokenizer(run.model), ("", ""), torch.float32), run)
        return {name.split(".")[-4] for name, _ in module.named_parameters() if ".lora_A." in name}

    with pytest.raises(UserError, match=r"cannot load adapters of model\.layers\.1\.mlp\.shared_experts") as refused:
        adapted("[q_proj,up_proj]")
    assert refused.value.problems[0].fix == "method.target_modules=[q_proj]"
    assert adapted("[q_proj]") == {"q_proj"}
    assert adapted("[all-linear]") == {
        "g_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }

    for folder, targets in (("partial", "all-linear"), ("complete", ["q_proj"])):
        model = peft.get_peft_model(LagunaForCausalLM(config), peft.LoraConfig(target_modules=targets))
        model.save_pretrained(tmp_path / folder)
    refusal = r"does not load all of its weights: .*shared_experts"
    with pytest.raises(ValueError, match=refusal):
        load_peft_adapter(LagunaForCausalLM(config), tmp_path / "partial", "lora")
    served = load_peft_adapter(LagunaForCausalLM(config), tmp_path / "complete", "first")
    served = load_peft_adapter(served, tmp_path / "complete", "r")  # the names of the first one's weights contain an r
    with pytest.raises(ValueError, match=refusal):
        load_peft_adapter(served, tmp_path / "partial", "second")


def test_a_name_that_the_model_has_is_not_renamed() -> None:
    """transformers 5.24 renames `.norm.` in the files of DeepSeek V4, and saves the last norm as `model.norm.weight`."""
    config = DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config)
    loading = Loading.of(
        model, model.state_dict(), ["model.norm.weight", "norm.weight", "model.layers.0.attn.norm.weight"]
    )
    assert loading.dropped == ()
    assert loading.keys["model.norm.weight"] in ("model.norm.weight", "norm.weight")
    assert loading.keys["model.layers.0.self_attn.kv_norm.weight"] == "model.layers.0.attn.norm.weight"


def test_a_joined_tensor_is_split_by_the_shapes_of_partitioned_parameters() -> None:
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6), "k": torch.nn.Linear(4, 2)})
    for layer in model.values():
        layer.weight.ds_shape = layer.weight.shape
        layer.weight.data = torch.empty(0)
    joined = torch.arange(32.0).view(8, 4)
    parts = {"full_layer_name": "q.weight", "model": model, "config": None}
    with pytest.raises(RuntimeError, match="split_sizes"):
        Split(0).convert({"qk": joined}, ["qk"], ["q", "k"], **parts)
    with corrected_partitioned_loading():
        split = Split(0).convert({"qk": joined}, ["qk"], ["q", "k"], **parts)
    assert torch.equal(split["q"], joined[:6]) and torch.equal(split["k"], joined[6:])
