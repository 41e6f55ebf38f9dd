"""Tiny vision-language checkpoints in the form in which they are published: the class that has the tower, and processor files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstune.testing.tiny import SPECIAL
from tests.support.tiny import WORDS, save_tokenizer

VOCABULARY = len(SPECIAL) + len(WORDS) + 8
IMAGE, BEGIN, END, VIDEO, AUDIO = range(VOCABULARY - 5, VOCABULARY)

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
    "tie_word_embeddings": True,
}
MTP = {"mtp.fc.weight": (32, 64), "mtp.layers.0.mlp.down_proj.weight": (32, 64), "mtp.norm.weight": (32,)}
"""The multi-token-prediction head of Qwen 3.5, which is in the files and in no class of transformers."""


def _gemma3() -> Any:
    from transformers import Gemma3Config

    tokens = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END}
    return Gemma3Config(text_config=TEXT | {"sliding_window": 16}, vision_config=VISION, **tokens)


def _qwen3_5() -> Any:
    from transformers import Qwen3_5Config

    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "mtp_num_hidden_layers": 1,
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    rope |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    return Qwen3_5Config(
        text_config=TEXT | linear | {"rope_parameters": rope}, vision_config=QWEN_VISION, **QWEN_TOKENS
    )


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = QWEN_VISION | {"deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **QWEN_TOKENS)


def _mistral3() -> Any:
    """Build Ministral 3."""
    from transformers import Mistral3Config

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    text = TEXT | {"model_type": "ministral3", "rope_parameters": rope}
    vision = VISION | {"model_type": "pixtral", "head_dim": 8}
    return Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2, tie_word_embeddings=True
    )


def _gemma4() -> Any:
    from transformers import Gemma4Config

    layers = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8}
    layers |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
    tokens = {"image_token_id": IMAGE, "boi_token_id": BEGIN, "eoi_token_id": END}
    tokens |= {"audio_token_id": AUDIO, "video_token_id": VIDEO}
    return Gemma4Config(text_config=TEXT | layers, vision_config=VISION, audio_config=None, **tokens)


CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "qwen3_5": _qwen3_5,
    "qwen3_vl": _qwen3_vl,
    "mistral3": _mistral3,
    "gemma4": _gemma4,
}

PROCESSOR_FILES = {
    "processor_config.json": {"processor_class": "SomeProcessor"},
    "preprocessor_config.json": {"image_processor_type": "SomeImageProcessor", "size": {"height": 28, "width": 28}},
    "video_preprocessor_config.json": {"video_processor_type": "SomeVideoProcessor"},
}


def build(kind: str) -> Any:
    """Return the model of a kind, with weights of a seed, as `AutoModelForImageTextToText` makes it."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[kind]())
    with torch.no_grad():  # transformers begins some projectors, norms and biases at zero
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02)
    return model


def save(kind: str, folder: Path) -> Path:
    """Write a checkpoint of a kind with tokenizer and processor files; of Qwen 3.5 with a head for several tokens, in bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    build(kind).save_pretrained(folder)
    save_tokenizer(folder)
    for name, content in PROCESSOR_FILES.items():
        (folder / name).write_text(json.dumps(content))
    if kind == "qwen3_5":
        generator = torch.Generator().manual_seed(1)
        extra = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in MTP.items()}
        weights = load_file(folder / "model.safetensors")
        save_file(weights | extra, folder / "model.safetensors", {"format": "pt"})
    return folder
