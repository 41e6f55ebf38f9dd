"""Models of 2024 to 2026: what their `config.json` says, licence and kind, each with the public page where it was read.

`verified` is the day on which the numbers were read at `source`. An entry without it was written down from memory: its
parameters were compared with the size in the model's name, and nothing else of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

READ = "2026-12-01"
MAXTEXT = "github.com/AI-Hypercomputer/maxtext/blob/e591f30c/src/maxtext/configs/models/{}.yml"
CLASS = "huggingface.co/docs/transformers/model_doc/{} (defaults of transformers 5.24)"
PAGE = "huggingface.co/{}/blob/main/config.json"
WHATMODEL = "github.com/jakemanger/whatmodel/blob/main/pages/model/{}.md (sizes: defaults of transformers 5.24)"
KERAS = "github.com/keras-team/keras-hub/blob/master/keras_hub/src/models/gemma3/gemma3_presets.py"
MINIMAX = "huggingface.co/collections/MiniMaxAI/minimax-m2"
XINFERENCE = "inference.readthedocs.io/en/latest/models/builtin/llm/{}.html"


@dataclass(frozen=True)
class Published:
    """A model of the hub."""

    path: str
    billions: float
    """Parameters as its maker states them."""
    config: dict[str, Any]
    licence: str
    year: int
    context: int
    source: str
    verified: str = READ
    """Empty where nobody has read the numbers at `source`."""
    gated: bool = False
    modality: str = "text"
    use: str = "chat"
    """`chat`, `base`, `embedding`, `reranker` or `encoder`."""


def decoder_config(
    kind: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **fields: Any
) -> dict[str, Any]:
    """Return a `config.json` of model type `kind` with these sizes and further `fields`. inner: of the feed-forward layers."""
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **fields,
    }


def _qwen35(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv: int,
    values: int,
    tower: tuple[int, int, int],
    *,
    tied: bool = False,
) -> dict[str, Any]:
    """Describe Qwen 3.5. values: heads of values of linear attention. tower: blocks, width and inner width."""
    text = decoder_config(
        "qwen3_5_text", 248320, hidden, inner, layers, heads, kv, head_dim=256, linear_num_value_heads=values
    )
    depth, width, wide = tower
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": wide, "out_hidden_size": hidden}
    tie = {"tie_word_embeddings": tied}
    return {"model_type": "qwen3_5", "text_config": text | tie, "vision_config": vision, **tie}


def _qwen35_experts(
    hidden: int, inner: int, layers: int, heads: int, values: int, experts: int, chosen: int
) -> dict[str, Any]:
    text = decoder_config(
        "qwen3_5_moe_text", 248320, hidden, inner, layers, heads, 2, head_dim=256, linear_num_value_heads=values
    )
    text |= {"moe_intermediate_size": inner, "shared_expert_intermediate_size": inner}
    text |= {"num_experts": experts, "num_experts_per_tok": chosen}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": hidden}
    return {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": vision}


SMALL_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "head_dim": 64,
}
LARGE_TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "head_dim": 72,
}


def _gemma4(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tower: dict[str, Any], **fields: Any
) -> dict[str, Any]:
    every = fields.pop("every", 6)
    kinds = ["full_attention" if (index + 1) % every == 0 else "sliding_attention" for index in range(layers)]
    settings = {"layer_types": kinds, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0, **fields}
    text = decoder_config("gemma4_text", 262144, hidden, inner, layers, heads, kv_heads, **settings)
    vision = {"model_type": "gemma4_vision", "num_key_value_heads": tower["num_attention_heads"], **tower}
    audio = {"model_type": "gemma4_audio"} if tower is SMALL_TOWER else None
    return {"model_type": "gemma4", "text_config": text, "vision_config": vision, "audio_config": audio}


def _qwen3_vl(hidden: int, inner: int, layers: int, heads: int, tower: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    text = decoder_config("qwen3_vl_text", 151936, hidden, inner, layers, heads, 8, head_dim=128)
    vision = {"out_hidden_size": hidden, "patch_size": 16, "num_position_embeddings": 2304, **tower}
    tie = {"tie_word_embeddings": tied}
    return {"model_type": "qwen3_vl", "text_config": text | tie, "vision_config": vision, **tie}


SMALL_VL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_VL = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def _gemma3(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int = 256) -> dict[str, Any]:
    text = decoder_config(
        "gemma3_text", 262208, hidden, inner, layers, heads, kv_heads, head_dim=head_dim, sliding_window=1024
    )
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    vision |= {"num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    return {"model_type": "gemma3", "text_config": text, "vision_config": vision}


def _minimax_m2() -> dict[str, Any]:
    experts = {"num_local_experts": 256, "num_experts_per_tok": 8}
    stored = {"quantization_config": {"quant_method": "fp8"}}
    return decoder_config("minimax_m2", 200064, 3072, 1536, 62, 48, 8, head_dim=128, **experts, **stored)


PIXTRAL = {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
PIXTRAL |= {"num_attention_heads": 16, "head_dim": 64, "image_size": 1540, "patch_size": 14}


def _gemma3n(inner: int, layers: int, shared: int) -> dict[str, Any]:
    """Describe a Gemma 3n. shared: layers at the end that reuse the keys and values of an earlier layer."""
    kinds = ["full_attention" if (index + 1) % 5 == 0 else "sliding_attention" for index in range(layers)]
    settings = {"layer_types": kinds, "head_dim": 256, "num_kv_shared_layers": shared, "final_logit_softcapping": 30.0}
    settings |= {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "sliding_window": 512}
    text = decoder_config("gemma3n_text", 262400, 2048, inner, layers, 8, 2, **settings)
    vision = {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc", "hidden_size": 2048}
    return {
        "model_type": "gemma3n",
        "text_config": text,
        "vision_config": vision,
        "audio_config": {"model_type": "gemma3n_audio"},
    }


def _ministral3(hidden: int, inner: int, layers: int, *, tied: bool) -> dict[str, Any]:
    text = decoder_config("ministral3", 131072, hidden, inner, layers, 32, 8, head_dim=128, tie_word_embeddings=tied)
    return {"model_type": "mistral3", "text_config": text, "vision_config": PIXTRAL, "tie_word_embeddings": tied}


def _latent_attention(kind: str, hidden: int, inner: int, layers: int, heads: int, **fields: Any) -> dict[str, Any]:
    """Describe latent attention and experts, as DeepSeek 3 has them."""
    sizes = {
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    return decoder_config(
        kind, fields.pop("vocab_size"), hidden, inner, layers, heads, heads, n_shared_experts=1, **sizes | fields
    )


def _alternating(layers: int, *kinds: str) -> list[str]:
    return [kinds[index % len(kinds)] for index in range(layers)]


GPT_OSS = {"head_dim": 64, "num_experts_per_tok": 4, "quantization_config": {"quant_method": "mxfp4"}}
GRANITE = {"shared_intermediate_size": 8192, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_d_state": 128}
GRANITE |= {"mamba_n_heads": 64, "mamba_d_head": 64, "mamba_n_groups": 1, "tie_word_embeddings": True}
MAMBA_4 = ["attention" if index in (5, 15, 25, 35) else "mamba" for index in range(40)]
LFM2_16 = ["full_attention" if index in (2, 5, 8, 10, 12, 14) else "conv" for index in range(16)]
LFM2_30 = ["full_attention" if index in (2, 5, 9, 13, 17, 21, 24, 27) else "conv" for index in range(30)]
LFM2_MOE_24 = ["full_attention" if index in (2, 6, 10, 14, 18, 21) else "conv" for index in range(24)]
SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def _olmo3(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    kinds = _alternating(layers, *["sliding_attention"] * 3, "full_attention")
    return decoder_config("olmo3", 100278, hidden, inner, layers, heads, kv, layer_types=kinds, sliding_window=4096)


# fmt: off
TODAY: tuple[Published, ...] = (
    # Qwen 3.5: linear attention in three of four layers, and a tower that text never reaches.
    Published("Qwen/Qwen3.5-0.8B", 0.8, _qwen35(1024, 3584, 24, 8, 2, 16, (12, 768, 3072), tied=True), "apache-2.0", 2026,
        262144, "github.com/THUDM/slime/blob/f8879db2/scripts/models/qwen3.5-0.8B.sh", modality="text, images"),
    Published("Qwen/Qwen3.5-2B", 2, _qwen35(2048, 6144, 24, 8, 2, 16, (24, 1024, 4096), tied=True), "apache-2.0", 2026,
        262144, PAGE.format("Qwen/Qwen3.5-2B"), "", modality="text, images"),
    Published("Qwen/Qwen3.5-4B", 4, _qwen35(2560, 9216, 32, 16, 4, 32, (24, 1024, 4096), tied=True), "apache-2.0", 2026,
        262144, PAGE.format("Chat2Find/Chat2Find-CPT"), modality="text, images"),
    Published("Qwen/Qwen3.5-9B", 9, _qwen35(4096, 12288, 32, 16, 4, 32, (27, 1152, 4304)), "apache-2.0", 2026, 262144,
        PAGE.format("khtsly/Mini-Coder"), modality="text, images"),
    Published("Qwen/Qwen3.5-27B", 27, _qwen35(5120, 17408, 64, 24, 4, 48, (27, 1152, 4304)), "apache-2.0", 2026, 262144,
        PAGE.format("MooreThreads/MusaCoder-27B"), modality="text, images"),
    Published("Qwen/Qwen3.5-35B-A3B", 35, _qwen35_experts(2048, 512, 40, 16, 32, 256, 8), "apache-2.0", 2026, 262144,
        MAXTEXT.format("qwen3.5-35b-a3b"), modality="text, images"),
    Published("Qwen/Qwen3.5-397B-A17B", 397, _qwen35_experts(4096, 1024, 60, 32, 64, 512, 10), "apache-2.0", 2026, 262144,
        MAXTEXT.format("qwen3.5-397b-a17b"), modality="text, images"),
    # Qwen 3.6 and 3.8 have the architecture of 3.5.
    Published("Qwen/Qwen3.6-27B", 27, _qwen35(5120, 17408, 64, 24, 4, 48, (27, 1152, 4304)), "apache-2.0", 2026, 262144,
        "huggingface.co/Prince-1/Qwen3.6-27B", modality="text, images"),
    Published("Qwen/Qwen3.6-35B-A3B", 35, _qwen35_experts(2048, 512, 40, 16, 32, 256, 8), "apache-2.0", 2026, 262144,
        "docs.nvidia.com/nemo/megatron-bridge/0.6.0/models/qwen/qwen35-vl.html", modality="text, images"),
    Published("Qwen/Qwen3.8-27B", 27, _qwen35(5120, 17408, 64, 24, 4, 48, (27, 1152, 4304)), "apache-2.0", 2026, 262144,
        XINFERENCE.format("qwen3.8"), "", modality="text, images"),
    Published("Qwen/Qwen3-4B-Instruct-2507", 4, decoder_config("qwen3", 151936, 2560, 9728, 36, 32, 8, head_dim=128,
        tie_word_embeddings=True), "apache-2.0", 2025, 262144, PAGE.format("Qwen/Qwen3-4B-Instruct-2507"), ""),
    Published("Qwen/Qwen3-30B-A3B-Instruct-2507", 30.5, decoder_config("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768), "apache-2.0", 2025, 262144,
        PAGE.format("Qwen/Qwen3-30B-A3B-Instruct-2507"), ""),
    Published("Qwen/Qwen3-Coder-30B-A3B-Instruct", 30.5, decoder_config("qwen3_moe", 151936, 2048, 5472, 48, 32, 4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768), "apache-2.0", 2025, 262144,
        PAGE.format("Qwen/Qwen3-Coder-30B-A3B-Instruct"), ""),
    Published("Qwen/Qwen3-VL-2B-Instruct", 2.1, _qwen3_vl(2048, 6144, 28, 16, SMALL_VL, tied=True), "apache-2.0", 2025,
        262144, PAGE.format("Qwen/Qwen3-VL-2B-Instruct"), "", modality="text, images"),
    Published("Qwen/Qwen3-VL-8B-Instruct", 8.8, _qwen3_vl(4096, 12288, 36, 32, LARGE_VL, tied=False), "apache-2.0", 2025,
        262144, PAGE.format("Qwen/Qwen3-VL-8B-Instruct"), "", modality="text, images"),
    Published("Qwen/Qwen3-Next-80B-A3B-Instruct", 80, decoder_config("qwen3_next", 151936, 2048, 5120, 48, 16, 2, head_dim=256,
        num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        linear_num_value_heads=32), "apache-2.0", 2025, 262144, MAXTEXT.format("qwen3-next-80b-a3b")),
    # Gemma 3: the number of parameters without the tower was compared with the page.
    Published("google/gemma-3-4b-it", 4.3, _gemma3(2560, 10240, 34, 8, 4), "gemma", 2025, 131072, KERAS, "", gated=True,
        modality="text, images"),
    Published("google/gemma-3-12b-it", 12.2, _gemma3(3840, 15360, 48, 16, 8), "gemma", 2025, 131072, KERAS, "", gated=True,
        modality="text, images"),
    Published("google/gemma-3-27b-it", 27.4, _gemma3(5376, 21504, 62, 32, 16, head_dim=128), "gemma", 2025, 131072, KERAS, "",
        gated=True, modality="text, images"),
    # Gemma 4: small ones with an embedding for each layer, large ones with keys that are values too.
    Published("google/gemma-4-E2B-it", 5.1, _gemma4(1536, 6144, 35, 8, 1, SMALL_TOWER, every=5,
        hidden_size_per_layer_input=256, num_kv_shared_layers=20, use_double_wide_mlp=True, sliding_window=512), "apache-2.0",
        2026, 131072, MAXTEXT.format("gemma4-e2b"), modality="text, images, sound"),
    Published("google/gemma-4-E4B-it", 8, _gemma4(2560, 10240, 42, 8, 2, SMALL_TOWER, hidden_size_per_layer_input=256,
        num_kv_shared_layers=18, sliding_window=512), "apache-2.0", 2026, 131072, MAXTEXT.format("gemma4-e4b"),
        modality="text, images, sound"),
    Published("google/gemma-4-26B-A4B-it", 26, _gemma4(2816, 2112, 30, 16, 8, LARGE_TOWER, enable_moe_block=True,
        num_experts=128, top_k_experts=8, moe_intermediate_size=704, num_global_key_value_heads=2, attention_k_eq_v=True,
        sliding_window=1024), "apache-2.0", 2026, 262144, MAXTEXT.format("gemma4-26b"), modality="text, images"),
    Published("google/gemma-4-31B-it", 31, _gemma4(5376, 21504, 60, 32, 16, LARGE_TOWER, num_global_key_value_heads=4,
        attention_k_eq_v=True, sliding_window=1024), "apache-2.0", 2026, 262144, MAXTEXT.format("gemma4-31b"),
        modality="text, images"),
    # Gemma 3n: its vision tower needs the package timm.
    Published("google/gemma-3n-E2B-it", 5, _gemma3n(8192, 30, 10), "gemma", 2025, 32768,
        "github.com/Kuba-csproj/ai-edge-torch/blob/1d663aa5/ai_edge_torch/generative/examples/gemma3n/gemma3n.py", gated=True,
        modality="text, images, sound"),
    Published("google/gemma-3n-E4B-it", 8, _gemma3n(16384, 35, 15), "gemma", 2025, 32768, CLASS.format("gemma3n"), gated=True,
        modality="text, images, sound"),
    # Ministral 3: the instruct checkpoints without BF16 in their name are stored in FP8.
    Published("mistralai/Ministral-3-3B-Instruct-2512-BF16", 3.8, _ministral3(3072, 9216, 26, tied=True), "apache-2.0", 2025,
        262144, PAGE.format("rootlocalghost/ERNIE-Image"), modality="text, images"),
    Published("mistralai/Ministral-3-8B-Instruct-2512-BF16", 8.9, _ministral3(4096, 14336, 34, tied=False), "apache-2.0",
        2025, 262144, CLASS.format("ministral3"), modality="text, images"),
    Published("mistralai/Ministral-3-14B-Instruct-2512-BF16", 13.9, _ministral3(5120, 16384, 40, tied=False), "apache-2.0",
        2025, 262144, PAGE.format("mistralai/Ministral-3-14B-Base-2512"), "", modality="text, images"),
    # Mistral Small 3.1; 3.2 has the same sizes.
    Published("mistralai/Mistral-Small-3.1-24B-Instruct-2503", 24, {"model_type": "mistral3", "vision_config": PIXTRAL,
        "text_config": decoder_config("mistral", 131072, 5120, 32768, 40, 32, 8, head_dim=128), "tie_word_embeddings": False},
        "apache-2.0", 2025, 131072, PAGE.format("mistralai/Mistral-Small-3.1-24B-Instruct-2503"), "2026-12-03",
        modality="text, images"),
    Published("mistralai/Mistral-Small-4-119B-2603", 119, {"model_type": "mistral3", "text_config": {"model_type": "mistral4"},
        "vision_config": PIXTRAL}, "apache-2.0", 2026, 262144, WHATMODEL.format("mistral-small-4"), modality="text, images"),
    # gpt-oss: experts in MXFP4, dequantized while they are loaded.
    Published("openai/gpt-oss-20b", 20.9, decoder_config("gpt_oss", 201088, 2880, 2880, 24, 64, 8, num_local_experts=32, **GPT_OSS),
        "apache-2.0", 2025, 131072, MAXTEXT.format("gpt-oss-20b")),
    Published("openai/gpt-oss-120b", 116.8, decoder_config("gpt_oss", 201088, 2880, 2880, 36, 64, 8, num_local_experts=128,
        **GPT_OSS), "apache-2.0", 2025, 131072, MAXTEXT.format("gpt-oss-120b")),
    Published("zai-org/GLM-4.7-Flash", 30, _latent_attention("glm4_moe_lite", 2048, 10240, 47, 20, vocab_size=154880,
        q_lora_rank=768, qk_nope_head_dim=192, v_head_dim=256, n_routed_experts=64, num_experts_per_tok=4,
        moe_intermediate_size=1536), "mit", 2026, 202752, PAGE.format("naaviii/glm-code-next-4b")),
    Published("zai-org/GLM-4.5-Air", 106, decoder_config("glm4_moe", 151552, 4096, 10944, 46, 96, 8, head_dim=128,
        attention_bias=True, n_routed_experts=128, moe_intermediate_size=1408, num_experts_per_tok=8, n_shared_experts=1,
        first_k_dense_replace=1), "mit", 2025, 131072, PAGE.format("PrimeIntellect/INTELLECT-3-Base")),
    Published("zai-org/GLM-4.6", 355, decoder_config("glm4_moe", 151552, 5120, 12288, 92, 96, 8, head_dim=128, attention_bias=True,
        use_qk_norm=True, n_routed_experts=160, moe_intermediate_size=1536, num_experts_per_tok=8, n_shared_experts=1,
        first_k_dense_replace=3), "mit", 2025, 202752, XINFERENCE.format("glm-4.6"), ""),
    Published("zai-org/GLM-4.7", 358, decoder_config("glm4_moe", 151552, 5120, 12288, 92, 96, 8, head_dim=128, attention_bias=True,
        use_qk_norm=True, n_routed_experts=160, moe_intermediate_size=1536, num_experts_per_tok=8, n_shared_experts=1,
        first_k_dense_replace=3), "mit", 2025, 202752, "huggingface.co/zai-org/GLM-4.7/blob/refs/pr/49/config.json"),
    Published("zai-org/GLM-5", 744, _latent_attention("glm_moe_dsa", 6144, 12288, 78, 64, vocab_size=154880, q_lora_rank=2048,
        qk_nope_head_dim=192, v_head_dim=256, n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048), "mit",
        2026, 202752, CLASS.format("glm_moe_dsa")),
    Published("HuggingFaceTB/SmolLM3-3B", 3.1, decoder_config("smollm3", 128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True),
        "apache-2.0", 2025, 65536, CLASS.format("smollm3")),
    Published("allenai/Olmo-3-7B-Instruct", 7.3, _olmo3(4096, 11008, 32, 32, 32), "apache-2.0",
        2025, 65536, MAXTEXT.format("olmo3-7b")),
    Published("allenai/Olmo-3.1-32B-Instruct", 32.2, _olmo3(5120, 27648, 64, 40, 8), "apache-2.0",
        2025, 65536, MAXTEXT.format("olmo3-32b")),
    Published("ibm-granite/granite-4.0-micro", 3.4, decoder_config("granitemoehybrid", 100352, 2560, 8192, 40, 40, 8,
        **GRANITE | {"layer_types": ["attention"] * 40, "mamba_n_heads": 128, "mamba_d_head": 40, "mamba_d_state": 256}),
        "apache-2.0", 2025, 131072, PAGE.format("Sethblocks/Neuron-v0.3-3b")),
    Published("ibm-granite/granite-4.0-h-micro", 3.2, decoder_config("granitemoehybrid", 100352, 2048, 8192, 40, 32, 8,
        **GRANITE | {"layer_types": MAMBA_4}), "apache-2.0", 2025, 131072, PAGE.format("anuj6316/granite")),
    Published("ibm-granite/granite-4.0-h-tiny", 6.9, decoder_config("granitemoehybrid", 100352, 1536, 512, 40, 12, 4,
        **GRANITE | {"layer_types": MAMBA_4, "mamba_n_heads": 48, "shared_intermediate_size": 1024, "num_local_experts": 64,
        "num_experts_per_tok": 6}), "apache-2.0", 2025, 131072,
        PAGE.format("inference-optimization/granite-4.0-h-tiny-FP8-dynamic")),
    # LFM2: config.json has 128,000 positions, the model cards state 32,768 (featherless.ai/models/LiquidAI/LFM2-1.2B too).
    Published("LiquidAI/LFM2-350M", 0.35, decoder_config("lfm2", 65536, 1024, 6656, 16, 16, 8, layer_types=LFM2_16,
        block_auto_adjust_ff_dim=True, block_multiple_of=256, block_ffn_dim_multiplier=1.0, tie_word_embeddings=True),
        "lfm1.0", 2025, 32768, PAGE.format("Thorge-AI/lfm2-web-runtime-weights")),
    Published("LiquidAI/LFM2-1.2B", 1.2, decoder_config("lfm2", 65536, 2048, 12288, 16, 32, 8, layer_types=LFM2_16,
        block_auto_adjust_ff_dim=True, block_multiple_of=256, block_ffn_dim_multiplier=1.0, tie_word_embeddings=True),
        "lfm1.0", 2025, 32768, PAGE.format("saranshagarwal2020/p-vector")),
    Published("LiquidAI/LFM2-2.6B", 2.6, decoder_config("lfm2", 65536, 2048, 10752, 30, 32, 8, layer_types=LFM2_30,
        block_auto_adjust_ff_dim=False, tie_word_embeddings=True), "lfm1.0", 2025, 32768,
        PAGE.format("LiquidAI/LFM2-2.6B-Transcript-ONNX")),
    Published("LiquidAI/LFM2-8B-A1B", 8.3, decoder_config("lfm2_moe", 65536, 2048, 7168, 24, 32, 8, layer_types=LFM2_MOE_24,
        moe_intermediate_size=1792, num_dense_layers=2, num_experts=32, num_experts_per_tok=4), "lfm1.0", 2025, 32768,
        PAGE.format("LiquidAI/LFM2-8B-A1B"), ""),
    Published("LiquidAI/LFM3-1.7B", 1.73, {"model_type": "lfm3"}, "lfm1.0", 2026, 128000, WHATMODEL.format("lfm3-1-7b")),
    Published("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", 120.7, decoder_config("nemotron_h", 131072, 4096, 2688, 88, 32, 2,
        head_dim=128, hybrid_override_pattern=SUPER, mamba_num_heads=128, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
        n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2688, moe_shared_expert_intermediate_size=5376,
        n_shared_experts=1, moe_latent_size=1024), "nvidia-open-model", 2026, 262144,
        PAGE.format("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16"), ""),
    Published("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 31.6, decoder_config("nemotron_h", 131072, 2688, 1856, 52, 32, 2,
        head_dim=128, hybrid_override_pattern=NANO, mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
        n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
        n_shared_experts=1), "nvidia-open-model", 2025, 262144,
        "github.com/THUDM/slime/blob/46772aec/scripts/models/nemotron-nano-30B-A3B.sh"),
    Published("microsoft/phi-4", 14.7, decoder_config("phi3", 100352, 5120, 17920, 40, 40, 10), "mit", 2024, 16384,
        PAGE.format("microsoft/phi-4"), ""),
    Published("microsoft/Phi-4-mini-instruct", 3.8, decoder_config("phi3", 200064, 3072, 8192, 32, 24, 8, tie_word_embeddings=True,
        partial_rotary_factor=0.75), "mit", 2025, 131072,
        "huggingface.co/onnx-community/Phi-4-mini-instruct-ONNX-GQA/blame/39b0c116/config.json"),
    Published("meta-llama/Llama-3.2-3B-Instruct", 3.2, decoder_config("llama", 128256, 3072, 8192, 28, 24, 8, head_dim=128,
        tie_word_embeddings=True), "llama3.2", 2024, 131072, PAGE.format("meta-llama/Llama-3.2-3B-Instruct"), "", gated=True),
    Published("meta-llama/Llama-4-Scout-17B-16E-Instruct", 109, {"model_type": "llama4", "text_config": decoder_config(
        "llama4_text", 202048, 5120, 8192, 48, 40, 8, head_dim=128, intermediate_size_mlp=16384, num_local_experts=16,
        num_experts_per_tok=1, interleave_moe_layer_step=1), "vision_config": {"hidden_size": 1408, "intermediate_size": 5632,
        "num_hidden_layers": 34, "num_attention_heads": 16}}, "llama4", 2025, 10485760, MAXTEXT.format("llama4-17b-16e"),
        gated=True, modality="text, images"),
    Published("moonshotai/Kimi-K2-Instruct-0905", 1026, _latent_attention("deepseek_v3", 7168, 18432, 61, 64, vocab_size=163840,
        n_routed_experts=384, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=1, n_group=1,
        topk_group=1, quantization_config={"quant_method": "fp8"}), "modified-mit", 2025, 262144,
        MAXTEXT.format("kimi-k2-1t")),
    Published("moonshotai/Kimi-K2.6", 1026, {"model_type": "kimi_k25", "text_config": _latent_attention("deepseek_v3", 7168,
        18432, 61, 64, vocab_size=163840, n_routed_experts=384, num_experts_per_tok=8, moe_intermediate_size=2048,
        first_k_dense_replace=1, n_group=1, topk_group=1)}, "modified-mit", 2026, 262144, PAGE.format("moonshotai/Kimi-K2.6"), "",
        modality="text, images"),
    Published("moonshotai/Kimi-Linear-48B-A3B-Instruct", 48, {"model_type": "kimi_linear"}, "mit", 2025, 1048576,
        CLASS.format("kimi_linear")),
    Published("MiniMaxAI/MiniMax-M2", 229, _minimax_m2(), "modified-mit", 2025,
        196608, CLASS.format("minimax_m2")),
    Published("MiniMaxAI/MiniMax-M2.5", 229, _minimax_m2(), "modified-mit", 2026, 196608, MINIMAX, ""),
    Published("MiniMaxAI/MiniMax-M2.7", 229, _minimax_m2(), "modified-mit", 2026, 196608, MINIMAX, ""),
    Published("deepseek-ai/DeepSeek-V4-Flash", 284, {"model_type": "deepseek_v4", "quantization_config": {"quant_method": "fp8"}},
        "mit", 2026, 1048576, CLASS.format("deepseek_v4")),
    Published("deepseek-ai/DeepSeek-V3.2", 671, _latent_attention("deepseek_v32", 7168, 18432, 61, 128, vocab_size=129280,
        n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3,
        quantization_config={"quant_method": "fp8"}), "mit", 2025, 163840, MAXTEXT.format("deepseek3.2-671b")),
    Published("MiniMaxAI/MiniMax-M2.1", 229, _minimax_m2(), "modified-mit", 2025,
        196608, PAGE.format("QuixiAI/MiniMax-M2.1-bf16")),
    Published("deepseek-ai/DeepSeek-R1-0528", 671, _latent_attention("deepseek_v3", 7168, 18432, 61, 128, vocab_size=129280,
        n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3,
        quantization_config={"quant_method": "fp8"}), "mit", 2025, 163840, PAGE.format("amd/DeepSeek-R1-0528-MXFP4")),
    Published("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8.0, decoder_config("llama", 128256, 4096, 14336, 32, 32, 8, head_dim=128,
        tie_word_embeddings=False), "mit", 2025, 131072,
        "huggingface.co/casperhansen/deepseek-r1-distill-llama-8b-awq/blob/652e9f65/config.json"),
    Published("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7.6, decoder_config("qwen2", 152064, 3584, 18944, 28, 28, 4,
        tie_word_embeddings=False), "mit", 2025, 131072, PAGE.format("ZMC2019/DeepSeek-R1-7B-tuned")),
    # Encoders, embeddings and rerankers.
    Published("google/embeddinggemma-300m", 0.3, decoder_config("gemma3_text", 262144, 768, 1152, 24, 3, 1, head_dim=256,
        sliding_window=512, use_bidirectional_attention=True), "gemma", 2025, 2048, PAGE.format("google/embeddinggemma-300m"),
        "", gated=True, use="embedding"),
    Published("Qwen/Qwen3-Embedding-0.6B", 0.6, decoder_config("qwen3", 151669, 1024, 3072, 28, 16, 8, head_dim=128,
        tie_word_embeddings=True), "apache-2.0", 2025, 32768, PAGE.format("Qwen/Qwen3-Embedding-0.6B"), "", use="embedding"),
    Published("Qwen/Qwen3-Embedding-4B", 4, decoder_config("qwen3", 151665, 2560, 9728, 36, 32, 8, head_dim=128,
        tie_word_embeddings=True), "apache-2.0", 2025, 40960, PAGE.format("Qwen/Qwen3-Embedding-4B"), "", use="embedding"),
    Published("Qwen/Qwen3-Reranker-0.6B", 0.6, decoder_config("qwen3", 151669, 1024, 3072, 28, 16, 8, head_dim=128,
        tie_word_embeddings=True), "apache-2.0", 2025, 40960, PAGE.format("Qwen/Qwen3-Reranker-0.6B"), "", use="reranker"),
)
# fmt: on
