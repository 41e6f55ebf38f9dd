"""GGUF files of each architecture: llama.cpp computes the logits that transformers computes, and weights are read back exactly."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint import gguf_vocabulary
from dstune.checkpoint.gguf_file import read_weights, write_gguf
from tests.support.gguf_models import REPLACE, SIZES, SPLIT, save_byte_level, save_pieces
from tests.support.sight import FAMILIES

F32 = 0
"""llama.cpp's number of the type of its cache, which is f16 otherwise and takes 0.1 to 0.7% of the largest logit."""
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MINISTRAL3 = {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 4096,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 4.0,
}
LAYERS = {"num_hidden_layers": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": (
        "Llama",
        {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "ministral3": ("Ministral3", MINISTRAL3),
    "mixtral": ("Mixtral", EXPERTS),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 with yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"moe_intermediate_size": 64, "norm_topk_prob": True, "head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3_text": (
        "Gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 6},
    ),
    "smollm3": ("SmolLM3", LAYERS),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", LAYERS | {"sliding_window": 8}),
    "olmo3 with yarn": (
        "Olmo3",
        LAYERS | {"sliding_window": 8, "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},
    ),
    "granite": ("Granite", GRANITE),
    "phi3": ("Phi3", {}),
    "phi3 with longrope": (
        "Phi3",
        {"rope_parameters": LONGROPE, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
    ),
    "glm4": ("Glm4", {"head_dim": 16}),
    "lfm2": (
        "Lfm2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "intermediate_size": 100,
            "block_multiple_of": 32,
        },
    ),
    "seed_oss": ("SeedOss", {"head_dim": 32}),
}


QWEN35 = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2], "mrope_interleaved": True},
}
GEMMA4 = {
    "head_dim": 16,
    "sliding_window": 8,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 30.0,
    "per_layer_config": {"2": {"head_dim": 32}, "5": {"head_dim": 32}},
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        "sliding_attention": PLAIN,
    },
}
LINEAR = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "gemma4": GEMMA4,
    "gemma3": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN},
    },
    "mistral3": {"model_type": "ministral3", **MINISTRAL3},
    "qwen2_5_vl": {"head_dim": 16, "rope_parameters": PLAIN | {"mrope_section": [4, 2, 2]}},
    "qwen3_5": QWEN35 | {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4},
    "qwen3_vl": {"head_dim": 32, "rope_parameters": PLAIN | {"mrope_section": [6, 5, 5]}},
}


def save_with_images(folder: Path, kind: str) -> Any:
    """Save a model with a vision tower, whose text part is as wide as those of the other cases."""
    from transformers import AutoModelForImageTextToText

    rows = save_pieces(folder, REPLACE, SPLIT) if kind == "gemma4" else save_byte_level(folder)
    _, _, config = FAMILIES[kind]()
    values = config.to_dict()
    if kind == "gemma4":
        values["text_config"] |= {"vocab_size_per_layer_input": rows}
    values["text_config"] |= SIZES | {"vocab_size": rows} | copy.deepcopy(WITH_IMAGES[kind])
    if "out_hidden_size" in values["vision_config"]:
        values["vision_config"]["out_hidden_size"] = SIZES["hidden_size"]
    for key in values:
        if key.endswith(("_token_id", "_token_index")):
            values[key] = rows - 1
    torch.manual_seed(0)
    return finished(AutoModelForImageTextToText.from_config(type(config).from_dict(values)), folder)


def finished(model: Any, folder: Path) -> Any:
    """Make every tensor count, biases and norms too, and save the model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.eval().save_pretrained(folder)
    return model


def save(folder: Path, name: str) -> Any:
    import transformers

    if name in WITH_IMAGES:
        return save_with_images(folder, name)
    kind, changes = CASES[name]
    rows = save_byte_level(folder)
    values = copy.deepcopy(SIZES | {"vocab_size": rows} | changes)  # transformers writes into rope parameters
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(**values)
    torch.manual_seed(0)
    return finished(getattr(transformers, f"{kind}ForCausalLM")(config), folder)


@pytest.mark.parametrize("name", [*CASES, *WITH_IMAGES])
def test_weights_are_read_back(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    model = save(tmp_path, name)
    before = load_file(tmp_path / "model.safetensors")
    write_gguf(tmp_path, tmp_path / "model.gguf", "f32", "model")
    names = {key: list(weight.shape) for key, weight in before.items()}
    found = dict(read_weights(tmp_path / "model.gguf", model.config.get_text_config(), names))
    assert set(found) == {key for key in before if not re.search("vision|visual|projector", key)}
    for key, weight in ((key, before[key]) for key in found):
        torch.testing.assert_close(torch.from_numpy(found[key].copy()), weight, rtol=1e-6, atol=1e-6)


def distances(folder: Path, model: Any, kind: str) -> torch.Tensor:
    """The largest difference of llama.cpp's logits from the model's at each token, relative to the largest logit."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install '.[kquants]'")
    write_gguf(folder, folder / "model.gguf", kind, "model")
    tokens = torch.randint(3, 250, (1, 48), generator=torch.Generator().manual_seed(1))
    served = llama_cpp.Llama(
        str(folder / "model.gguf"), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=F32, type_v=F32
    )
    served.eval(tokens[0].tolist())
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits[0]
    return (torch.tensor(served.scores[: tokens.shape[1]]) - expected).abs().amax(1) / expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *WITH_IMAGES])
def test_llama_cpp_computes_the_same_logits(tmp_path: Path, name: str) -> None:
    # llama.cpp looks up the GELU of Gemma in a table of f16.
    assert distances(tmp_path, save(tmp_path, name), "f32").max() < (5e-3 if name.startswith("gemma") else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "lfm2", "phi3"])
def test_stacked_experts_and_convolutions_in_eight_bits(tmp_path: Path, name: str) -> None:
    import gguf

    # Of most tokens: at some of them the rounding chooses other experts.
    assert 1e-3 < distances(tmp_path, save(tmp_path, name), "q8_0").median() < 0.1
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for tensor, kind in types.items():
        exact = "norm" in tensor or "ffn_gate_inp" in tensor or "shortconv.conv" in tensor
        assert kind == ("F32" if exact else "Q8_0"), tensor


TEXTS = [
    "Numbers like 1234567 and words, don't they?  They'LL\n\n\n  see: x=3.14;\ttabs",
    "ÉCOLE naïve สวัสดีครับ 東京 2024年 🙂🙂 -- «quoted» <|im_start|>user\nhi<|im_end|>\n",
    "   leading, and the words they like\r\n\r\n",
]
SPLITS = {
    "qwen35": (gguf_vocabulary._QWEN35, False),
    "gpt-2": (None, False),
    "llama-bpe": (gguf_vocabulary._LLAMA3, True),
    "dbrx": (gguf_vocabulary._LLAMA3, False),
    "qwen2": (gguf_vocabulary._LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_llama_cpp_splits_texts_as_the_tokenizer_does(tmp_path: Path, name: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install '.[kquants]'")
    from transformers import AutoTokenizer

    save(tmp_path, "llama")
    pattern, ignores_merges = SPLITS[name]
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["ignore_merges"] = ignores_merges
    # A token that no merges make: only a tokenizer that ignores merges finds it.
    vocabulary = state["model"]["vocab"]
    replaced = next(token for token in vocabulary if len(token) > 4)
    vocabulary["Ġtheyxlike"] = vocabulary.pop(replaced)
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "".join(merge) != replaced]
    if pattern:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "f32", "model")
    served = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert served.metadata["tokenizer.ggml.pre"] == name
    for text in [*TEXTS, "and theyxlike it"]:
        expected = tokenizer(text)["input_ids"]
        assert served.tokenize(text.encode(), add_bos=False, special=True) == expected, text
    found = vocabulary["Ġtheyxlike"] in tokenizer("and theyxlike it")["input_ids"]
    assert found == ignores_merges


@pytest.mark.slow
def test_llama_cpp_merges_pieces_of_gemma_4_as_the_tokenizer_does(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install '.[kquants]'")
    from transformers import AutoTokenizer

    save(tmp_path, "gemma4")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "f32", "model")
    served = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert served.metadata["tokenizer.ggml.model"] == "gemma4"
    for text in [*TEXTS, "ab ab  a b\n\nab", " ab"]:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert served.tokenize(text.encode(), add_bos=False, special=True) == expected, text
