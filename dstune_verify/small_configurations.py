"""Small sizes for the configurations of transformers: a few thousand weights, and each kind of layer once.

The sizes in a configuration are known by their names. A list with an entry for each layer is cut to the layers that show each of
its values once, so that a hybrid keeps its attention, its state space and its experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 128
HIDDEN, HEADS, HEAD_DIM, INNER, POSITIONS, WINDOW = 32, 4, 8, 48, 256, 16
WINDOWS = r"sliding_window(_size)?|attention_window(_size)?|local_attention|window_size|local_attention_window"

SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?|codebook_size|codebook_dim|n_vocab|n_symbols|audio_num_codebooks_size", VOCABULARY),
    (WINDOWS, WINDOW),
    (
        (
            r".*max_.*position.*|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length|max_length|"
            r"seq_length|block_size"
        ),
        POSITIONS,
    ),
    (r"first_k_dense_replace|num_dense_layers|n_dense_layers|num_first_dense_layers", 1),
    (
        (
            r"(num_|n_)?(experts_per_tok|experts_per_token|activated_experts|experts_topk|moe_topk|"
            r"selected_experts)|moe_k|top_k_experts|moe_num_active_primary_experts|num_experts_per_tok(en)?|"
            r"experts_top_k|moe_top_k|moe_num_experts_per_tok"
        ),
        2,
    ),
    (r"n_shared_experts|num_shared_experts?|moe_num_shared_experts", 1),
    (r"zero_expert_num", 1),
    (
        (
            r"(num_|n_)(local_|routed_)?experts|moe_num_(primary_)?experts|num_moe_experts|num_local_experts|"
            r"n_routed_experts|moe_num_experts"
        ),
        4,
    ),
    (r"(num_)?expert_groups?|n_group|num_groups_experts|topk_group|num_expert_group", 1),
    (
        (
            r"linear_head_dim|qk_nope_head_dim|v_head_dim|qk_rope_head_dim|index_head_dim|linear_(key|"
            r"value)_head_dim|(global_)?head_dim|d_kv|kv_channels|d_head|attention_head_size|qk_head_dim|"
            r"swa_head_dim|swa_v_head_dim|mamba_d_head|mamba_head_dim|head_size|lightning_head_dim|"
            r"kv_head_dim|attention_head_dim|rope_head_dim|o_lora_rank"
        ),
        HEAD_DIM,
    ),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"rotary_dim|qk_rope_dim", 4),
    (r"(.*_)?(q|kv|k|v|o|qkv|decay|gate|a|value|low_rank)_lora_rank.*|.*lora_rank.*", 8),
    (r"index_topk", 8),
    ("index_n_heads", 32),  # with few heads many scores are zero, and which of them are chosen is chance
    (
        (
            r"linear_num_heads|linear_num_value_heads|num_v_heads|num_attention_heads|n_head|n_heads|"
            r"num_heads|(en|de)coder_attention_heads|attention_heads|(.*_)?num_attention_heads|"
            r"num_encoder_attention_heads|num_decoder_attention_heads"
        ),
        HEADS,
    ),
    (
        (
            r"(.*_)?num_(key_value|kv|key)_heads|num_kv_heads|n_kv_heads|multi_query_group_num|"
            r"linear_num_key_heads|num_key_value_groups_.*"
        ),
        2,
    ),
    (
        (
            r".*(intermediate|ffn|feed_forward|mlp|inner|expert).*(size|dim|channels|hidden)(_.*)?|d_ff|"
            r"d_inner|n_inner|ffn_hidden_size|(en|de)coder_ffn_dim|dim_ff|ff_dim|d_ffn|ffn_size"
        ),
        INNER,
    ),
    (r"(ssm|mamba|mamba2)?_?(d_)?state(_size)?|mamba_d_state|ssm_state_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"mamba_n_groups|n_groups|mamba_ngroups|mamba_num_groups", 1),
    (r"(mamba_)?chunk_size|mamba_chunk_size", 8),
    (
        (
            r"hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|embedding_dim|model_dim|hidden_dim|embedding_size"
            r"|word_embed_proj_dim|lru_width|hidden_size_per_layer_input|n_embed|attention_hidden_size|decoder_hidden_size"
            r"|cross_attention_hidden_size|num_hidden_size|width|encoder_hidden_size|rnn_hidden_size|bottleneck_size"
            r"|(audio|backbone)_hidden_size"
        ),
        HIDDEN,
    ),
    (
        (
            r"(num_|n_)?(hidden_|decoder_|encoder_)?(layers?|blocks)|num_(en|de)coder_layers|(en|de)coder_layers|depth"
            r"|num_mem_blocks|num_loops_.*"
        ),
        2,
    ),
    (r"num_kv_shared_layers", 0),
    (r"num_nextn_predict_layers|mtp_num_hidden_layers|num_mtp_modules|num_mtp_layers", 0),
    (r"image_size", 28),
    (r"patch_size", 14),
)
NO_DROPOUT = re.compile(r".*(dropout|drop_rate|layerdrop|pdrop|drop_path|jitter).*")
LAYERS = re.compile(r"(num_|n_)(hidden_)?layers?|num_hidden_layers|n_layer|num_decoder_layers")
TOKENS = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 4, "decoder_start_token_id": 2}

DOTS = {"head_dim": 16, "per_layer_config": {"2": {"qk_nope_head_dim": 16, "head_dim": 24}}}
LLAMA4 = {
    "num_hidden_layers": 4,
    "moe_layers": [1, 3],
    "no_rope_layers": [1, 1, 1, 0],
    "layer_types": [*["chunked_attention"] * 3, "full_attention"],
    "attention_chunk_size": WINDOW,
    "floor_scale": WINDOW,
}
GEMMA4 = {"num_kv_shared_layers": 0, "per_layer_config": {"2": {"head_dim": 16}}}
ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {},
}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_embed_dim": 32,
    "output_gate_type": "silu",
    "head_dim": 8,
    "hc_count": 2,
    "ngram_vocab_size_base": 512,
    "split_ngram_parts": 4,
    "layer_types": ["linear_attention", "indexed_attention"],
    "num_hidden_layers": 2,
}
BY_KIND: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in ("full_attention", "sliding_attention")
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {
        # Attention and its MLP count as two layers in a file.
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
        "num_hidden_layers": 8,
        "n_recurrent_loops": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": DOTS,
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": DOTS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "emu3": {"vq_config": {"base_channels": 32}, "vocabulary_map": {"<image>": 126, "<|extra_200|>": 125}},
    # timm has no name for a smaller tower; this one has 84 blocks of some 8 channels. Rounding to fp32 changes gradients of a
    # Gemma 3n by up to 5e-4 with weights of the usual size here, and those of a Llama by 1e-6.
    "gemma3n": {
        "initializer_range": 0.1,
        "text_config": {"initializer_range": 0.1},
        "vision_config": {"model_args": {"channel_multiplier": 0.02}},
    },
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "gemma4_assistant": {"text_config": ASSISTANT},
    "gemma4_unified_assistant": {"text_config": ASSISTANT},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_experts": 4, "moe_topk": 2},
    "llama4": {"text_config": LLAMA4},
    "llama4_text": LLAMA4,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": HEAD_DIM, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"num_key_value_heads": 2},
    "longcat_flash": {"qk_head_dim": 16, "num_hidden_layers": 2, "num_key_value_heads": HEADS},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "num_buckets": 4},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "mistral4": {"num_key_value_heads": HEADS, "head_dim": 2 * HEAD_DIM},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "esmc": {"num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "mask_token_id": 5},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 5},
    "encoder-decoder": {
        "decoder_start_token_id": 1
    },  # with that of padding, transformers hides the first token from the decoder
    "deberta": {"pooler_hidden_size": HIDDEN},
    "deberta-v2": {"pooler_hidden_size": HIDDEN},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 36, "num_attention_heads": 2},
    **{kind: {"decoder_start_token_id": 2} for kind in ("t5", "longt5", "switch_transformers")},
    "t5gemma": {"vocab_size": VOCABULARY, "encoder": {"hidden_size": HIDDEN}},
    "perceiver": {"num_latents": 16, "d_latents": HIDDEN, "max_position_embeddings": POSITIONS, "image_size": 8},
    "vibevoice_asr": {
        f"{kind}_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7} for kind in ("acoustic", "semantic")
    },
    # By default every fourth layer has experts: of two layers none would.
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    # The three parts of a projection in the file are of one size.
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"num_key_value_heads": HEADS},
            "diarization_config": {"audio_config": {"num_key_value_heads": HEADS}},
        },
        "text_config": {"layers_block_type": ["linear_attention", "moe", "full_attention"]},
        "word_timestamp_config": {"num_key_value_heads": HEADS},
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 5,
    },
    "zamba2": {
        "hybrid_layer_ids": [2],
        "mamba_headdim": 8,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "kv_channels": 8,
        "num_query_groups": HEADS,
    },
}
"""What the names do not tell of a kind."""


def is_window(name: str) -> bool:
    """Return whether a configuration names the width of a sliding window so."""
    return re.fullmatch(WINDOWS, name) is not None


def _matching(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _layer_count(values: Mapping[str, Any]) -> int | None:
    """Return the number of layers that a configuration names, None where it names none."""
    return next((value for name, value in values.items() if LAYERS.fullmatch(name) and isinstance(value, int)), None)


def _cut(values: Mapping[str, Any], layers: int | None) -> list[int]:
    """Return which layers are left: at least two, and each value of each list of layers at least once."""
    chosen = [0, 1]
    for value in values.values():
        if isinstance(value, list) and layers and layers > 2 and len(value) == layers:
            seen = {repr(value[index]) for index in chosen}
            for index, entry in enumerate(value):
                if repr(entry) not in seen:
                    seen.add(repr(entry))
                    chosen.append(index)
    return sorted(set(chosen))


def shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration, with small sizes."""
    layers = _layer_count(values)
    kept_layers = _cut(values, layers)
    small_values: dict[str, Any] = {}
    for name, value in values.items():
        if name == "per_layer_config":
            small_values[name] = {}
        elif isinstance(value, Mapping) and name.endswith(("config", "encoder", "decoder")):
            small_values[name] = shrunk(value)
        elif name in TOKENS:
            small_values[name] = TOKENS[name]
        elif name.endswith(("_token_id", "_token_index", "token_ids")):
            small_values[name] = _token(value)
        elif isinstance(value, list) and layers and len(value) == layers:
            size = _matching(name)
            small_values[name] = [
                value[index] if size is None or not isinstance(value[index], int) else size for index in kept_layers
            ]
        elif LAYERS.fullmatch(name) and isinstance(value, int):
            small_values[name] = len(kept_layers)
        elif NO_DROPOUT.fullmatch(name) and isinstance(value, float | int) and not isinstance(value, bool):
            small_values[name] = type(value)(0)
        elif name in ("initializer_range", "init_std", "initializer_factor", "std"):
            small_values[name] = 0.2 if name != "initializer_factor" else 1.0
        elif name == "num_key_value_heads" and values.get("kv_lora_rank"):
            small_values[name] = HEADS  # latent attention has as many
        elif isinstance(value, int) and not isinstance(value, bool) and (size := _matching(name)) is not None:
            small_values[name] = min(size, value) if value > 0 else value
        else:
            small_values[name] = value
    return small_values


def _token(value: Any) -> Any:
    if isinstance(value, list):
        return [_token(entry) for entry in value]
    return VOCABULARY - 2 if isinstance(value, int) and value >= VOCABULARY else value


def merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes` merged into them at every depth."""
    for name, value in changes.items():
        values[name] = merged(dict(values.get(name) or {}), value) if isinstance(value, Mapping) else value
    return values
