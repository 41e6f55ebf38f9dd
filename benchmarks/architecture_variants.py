"""Architectures as published models configure them, where that is not the default of the configuration class.

Each is named KIND@VARIANT and has the values that differ, shrunk like those of `tiny_architectures.py`.
"""

from __future__ import annotations

from typing import Any

from tiny_architectures import HEAD_DIM, HEADS, HIDDEN, INNER, VOCABULARY, WINDOW

TIED = {"tie_word_embeddings": True}
THETA = 10_000.0
YARN = {
    "rope_type": "yarn",
    "rope_theta": THETA,
    "factor": 16.0,
    "original_max_position_embeddings": WINDOW,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": THETA,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 4.0],
    "original_max_position_embeddings": 128,
}
SLIDING_THEN_FULL = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
    "sliding_window": WINDOW,
}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
GEMMA4_SHARED = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "final_logit_softcapping": 30.0,
    "per_layer_config": {"2": {"head_dim": 16}, "5": {"head_dim": 16}},
}
GEMMA4_EXPERTS = {
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": INNER,
    "final_logit_softcapping": 30.0,
    "attention_k_eq_v": True,
}
NEMOTRON_3 = {
    "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "n_groups": 2,
}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "causal": {
        "llama@llama3.2": {"rope_parameters": LLAMA3, "head_dim": 2 * HEAD_DIM, **TIED},
        "llama@biases": {"attention_bias": True, "mlp_bias": True},
        "qwen2@tied": TIED,
        "qwen2@sliding": {"use_sliding_window": True, "max_window_layers": 1, **SLIDING_THEN_FULL},
        "qwen3@tied": {"head_dim": 2 * HEAD_DIM, **TIED},
        "qwen3_moe@dense-layers": {"mlp_only_layers": [0], "norm_topk_prob": True},
        "qwen3_5_text@tied": TIED,
        "mistral@full": {"sliding_window": None, "head_dim": 2 * HEAD_DIM},
        "mixtral@sliding": {"sliding_window": WINDOW},
        "ministral3@scaled": {
            "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0},
            **TIED,
        },
        "phi3@longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128, **TIED},
        "phi3@sliding": {"sliding_window": WINDOW},
        "phi@qk-norm": {"qk_layernorm": True},
        "gemma2@wide-scale": {"query_pre_attn_scalar": 2 * HEAD_DIM, "head_dim": 2 * HEAD_DIM},
        "gemma4_text@shared-kv": GEMMA4_SHARED,
        "gemma4_text@experts": GEMMA4_EXPERTS,
        "gpt_oss@yarn": {"rope_parameters": YARN | {"truncate": False}, **SLIDING_THEN_FULL},
        "deepseek_v3@groups": GROUPS
        | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "num_nextn_predict_layers": 1},
        "deepseek_v3@no-query-lora": {"q_lora_rank": None},
        "glm4_moe@4.5": {"attention_bias": True, "use_qk_norm": True, "num_nextn_predict_layers": 1},
        "granitemoehybrid@micro": {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["full_attention", "full_attention"],
            "num_hidden_layers": 2,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 10.0,
            **TIED,
        },
        "granitemoehybrid@h-tiny": {
            "layer_types": ["linear_attention", "full_attention"],
            "num_hidden_layers": 2,
            "position_embedding_type": "nope",
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            **TIED,
        },
        "lfm2@convolutions": {
            "layer_types": ["conv", "full_attention", "conv"],
            "full_attn_idxs": [1],
            "num_hidden_layers": 3,
            "block_multiple_of": 16,
        },
        "nemotron_h@3-nano": NEMOTRON_3,
        "olmo3@yarn": {"rope_parameters": YARN, **SLIDING_THEN_FULL},
        "smollm3@sliding": {"use_sliding_window": True, "no_rope_layers": [1, 0], **SLIDING_THEN_FULL},
        "exaone4@full": {"sliding_window": None, "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
        "llama4_text@scout": {
            "moe_layers": [0, 1, 2, 3],
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "use_qk_norm": True,
            "rope_parameters": LLAMA3,
        },
        "falcon@40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
        "falcon@alibi": {
            "alibi": True,
            "parallel_attn": False,
            "multi_query": False,
            "num_kv_heads": HEADS,
            "bias": True,
        },
        "opt@350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "gpt2@inverse-scale": {"scale_attn_by_inverse_layer_idx": True},
        "gpt_neox@sequential": {"use_parallel_residual": False},
        "stablelm@2-12b": {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
        "cohere@plus": {"use_qk_norm": True},
        "starcoder2@full": {"sliding_window": None},
        "gemma3_text@270m": {"num_key_value_heads": 1, **SLIDING_THEN_FULL},
    },
    "classification": {
        "deberta-v2@v3": {
            "relative_attention": True,
            "max_relative_positions": -1,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
        "deberta-v2@v2-xlarge": {
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "attention_head_size": HEAD_DIM,
        },
        "deberta@base": {
            "relative_attention": True,
            "max_relative_positions": -1,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
        },
        "modernbert@mean": {"classifier_pooling": "mean"},
        "electra@small": {"embedding_size": HIDDEN // 2},
        "albert@groups": {"embedding_size": HIDDEN // 2, "num_hidden_groups": 2},
        "gemma3_text@embedding": {"use_bidirectional_attention": True, **SLIDING_THEN_FULL},
        "qwen3@reranker": TIED,
    },
    "seq2seq": {
        "t5@v1.1": {
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "dense_act_fn": "gelu_new",
            "is_gated_act": True,
        },
        "bart@scaled": {"scale_embedding": True},
        "m2m_100@one-head-each": {"encoder_attention_heads": HEADS // 2},
    },
}
"""By group and name, the values in which a published configuration differs from the class's defaults."""
