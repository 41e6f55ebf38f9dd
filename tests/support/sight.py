"""Tiny vision-language models that can be trained on images: with a processor of their family, a chat template that prints a place
for an image, and rows of coloured squares."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstune.testing.tiny import SPECIAL, word_tokenizer

WORDS = [f"w{number}" for number in range(40)]

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'PLACE' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def language(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 2,
        "initializer_range": 0.2,
        **changes,
    }


def tokenizer_with(
    tokens: dict[str, str], place: str, words: list[str] = WORDS, further: tuple[str, ...] = (), base: Any = None
) -> Any:
    """Make a tokenizer with control tokens. tokens: by the attribute under which a processor asks for it (`image_token`). base: in
    place of a tokenizer of words."""
    added = [*dict.fromkeys(tokens.values()), *further]
    tokenizer = base or word_tokenizer([*SPECIAL, *words, "\n\n"])
    tokenizer.add_special_tokens({"additional_special_tokens": added}, replace_extra_special_tokens=False)
    tokenizer._set_model_specific_special_tokens(special_tokens=tokens)
    tokenizer.chat_template = TEMPLATE.replace("PLACE", place)
    return tokenizer


def llava(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    tokenizer = tokenizer_with({"image_token": "<image>"}, "<image>", words)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    strategy = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer, image_token="<image>", **strategy)
    config = LlavaConfig(
        text_config=LlamaConfig(**language(tokenizer, **text)),
        vision_config=CLIPVisionConfig(**TOWER, image_size=28, patch_size=14),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return processor, tokenizer, config


def gemma3(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = tokenizer_with(names, "<start_of_image>", words)
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4)
    begin, end, image = (tokenizer.convert_tokens_to_ids(token) for token in names.values())
    config = Gemma3Config(
        text_config=language(tokenizer, sliding_window=64, **text),
        vision_config=TOWER | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
    )
    return processor, tokenizer, config


def gemma4(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    import transformers
    from transformers import Gemma4Config

    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    sounds = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tokenizer = tokenizer_with(names | sounds, "<|image|>", words, ("<|video|>",))
    patches = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    images, videos = transformers.Gemma4ImageProcessor(**patches), transformers.Gemma4VideoProcessor(**patches)
    processor = transformers.Gemma4Processor(transformers.Gemma4AudioFeatureExtractor(), images, tokenizer, videos)
    image, begin, end = (tokenizer.convert_tokens_to_ids(token) for token in names.values())
    width = {"vocab_size_per_layer_input": len(tokenizer), "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    config = Gemma4Config(
        text_config=language(tokenizer, use_bidirectional_attention="vision", **width, **layers, **text),
        vision_config=TOWER
        | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2}
        | {"position_embedding_size": 128},
        image_token_id=image,
        boi_token_id=begin,
        eoi_token_id=end,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
    )
    return processor, tokenizer, config


def byte_tokenizer() -> Any:
    """Of the class that transformers opens for Qwen 3.5, whatever class was saved: each byte of a text is a token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen3_5Tokenizer

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}
    vocabulary = {token: number for number, token in enumerate([*SPECIAL[:5], *sorted(ByteLevel.alphabet())])}
    return Qwen3_5Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=["<|im_start|>"], **names)


def _qwen_processor(words: list[str], patch: int, name: str, *, by_bytes: bool = False) -> tuple[Any, Any]:
    import transformers

    pad = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    around = ("<|vision_start|>", "<|vision_end|>")
    base = byte_tokenizer() if by_bytes else None
    tokenizer = tokenizer_with(pad, "<|vision_start|><|image_pad|><|vision_end|>", words, around, base)
    pixels = {"patch_size": patch, "size": {"shortest_edge": 4 * patch * patch, "longest_edge": 16 * patch * patch}}
    images = transformers.Qwen2VLImageProcessor(**pixels)
    videos = getattr(transformers, "Qwen3VLVideoProcessor" if "3" in name else "Qwen2VLVideoProcessor")()
    return getattr(transformers, name)(images, tokenizer, videos), tokenizer


def _qwen_tokens(tokenizer: Any) -> dict[str, Any]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()} | {"tie_word_embeddings": True}


def qwen2_vl(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import Qwen2VLConfig

    processor, tokenizer = _qwen_processor(words, 14, "Qwen2VLProcessor")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    settings = language(tokenizer, rope_parameters=rope, **text)
    return processor, tokenizer, Qwen2VLConfig(text_config=settings, vision_config=vision, **_qwen_tokens(tokenizer))


def qwen2_5_vl(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import Qwen2_5_VLConfig

    processor, tokenizer = _qwen_processor(words, 14, "Qwen2_5_VLProcessor")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 14}
    vision |= {"out_hidden_size": 32, "window_size": 28, "fullatt_block_indexes": [1]}
    settings = language(tokenizer, rope_parameters=rope, **text)
    return processor, tokenizer, Qwen2_5_VLConfig(text_config=settings, vision_config=vision, **_qwen_tokens(tokenizer))


QWEN3_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


def qwen3_vl(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import Qwen3VLConfig

    processor, tokenizer = _qwen_processor(words, 16, "Qwen3VLProcessor")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    settings = language(tokenizer, rope_parameters=rope, **text)
    vision = QWEN3_TOWER | {"deepstack_visual_indexes": [0]}
    return processor, tokenizer, Qwen3VLConfig(text_config=settings, vision_config=vision, **_qwen_tokens(tokenizer))


def qwen3_5(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import Qwen3_5Config

    processor, tokenizer = _qwen_processor(words, 16, "Qwen3VLProcessor", by_bytes=True)
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    rope |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    # With larger weights the recurrence, which transformers always computes in fp32, is off by 1e-4 itself.
    settings = language(tokenizer, rope_parameters=rope, **linear, **{"initializer_range": 0.05, **text})
    config = Qwen3_5Config(text_config=settings, vision_config=QWEN3_TOWER, **_qwen_tokens(tokenizer))
    return processor, tokenizer, config


TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))


def _tiled(tokenizer: Any, text: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model that sees an image as tiles of 28 x 28 pixels."""
    return {
        "text_config": {"model_type": "llama", **language(tokenizer, **text)},
        "vision_config": TOWER | {"image_size": 28, "patch_size": 14},
        "scale_factor": 2,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": True,
        "pad_token_id": 2,
    }


def smolvlm(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    names = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_with(names, "<image>", words, TILES)
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    images = SmolVLMImageProcessor(**sizes)
    videos = SmolVLMVideoProcessor(**sizes)
    processor = SmolVLMProcessor(images, tokenizer, videos, image_seq_len=1)
    return processor, tokenizer, SmolVLMConfig(**_tiled(tokenizer, text))


def idefics3(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import Idefics3Config, Idefics3ImageProcessor, Idefics3Processor

    further = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *TILES)
    tokenizer = tokenizer_with({"image_token": "<image>"}, "<image>", words, further)
    images = Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1)
    tokenizer.add_special_tokens({"additional_special_tokens": list(further)}, replace_extra_special_tokens=False)
    return processor, tokenizer, Idefics3Config(**_tiled(tokenizer, text))


def internvl(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_with(names, "<IMG_CONTEXT>", words)
    size = {"size": {"height": 28, "width": 28}}
    images = GotOcr2ImageProcessor(**size, crop_to_patches=True, min_patches=1, max_patches=2)
    processor = InternVLProcessor(images, tokenizer, InternVLVideoProcessor(**size), image_seq_length=1)
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **language(tokenizer, **text)},
        vision_config=TOWER | {"image_size": [28, 28], "patch_size": [14, 14], "layer_scale_init_value": 1.0},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    return processor, tokenizer, config


def _pixtral_processor(words: list[str], merge: int) -> tuple[Any, Any]:
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = tokenizer_with({"image_token": "[IMG]"}, "[IMG]", words, ("[IMG_BREAK]", "[IMG_END]"))
    images = PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=merge), tokenizer


def mistral3(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import Mistral3Config

    processor, tokenizer = _pixtral_processor(words, 2)
    vision = TOWER | {"model_type": "pixtral", "head_dim": 8, "image_size": 56, "patch_size": 14}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **language(tokenizer, **text)},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return processor, tokenizer, config


def pixtral(words: list[str] = WORDS, **text: Any) -> tuple[Any, Any, Any]:
    from transformers import LlavaConfig

    processor, tokenizer = _pixtral_processor(words, 1)
    config = LlavaConfig(
        text_config={"model_type": "mistral", **language(tokenizer, **text)},
        vision_config=TOWER | {"model_type": "pixtral", "head_dim": 8, "image_size": 56, "patch_size": 14},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return processor, tokenizer, config


FAMILIES: dict[str, Callable[..., tuple[Any, Any, Any]]] = {
    "llava": llava,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "internvl": internvl,
    "mistral3": mistral3,
    "pixtral": pixtral,
}
"""Each makes a processor, its tokenizer and a model's configuration."""


def save(kind: str, folder: Path, **options: Any) -> Path:
    """Write the checkpoint of a family, every weight of which is random: fresh projectors and norms may be zero, and hide a
    fault."""
    import torch
    from transformers import AutoModelForImageTextToText

    processor, tokenizer, config = FAMILIES[kind](**options)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def draw(seed: int, size: tuple[int, int] = (32, 32)) -> Any:
    """Return an image of random blocks of colour."""
    import numpy as np
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def write_rows(
    folder: Path,
    count: int,
    *,
    images: Callable[[int], int] = lambda row: 1,
    sizes: tuple[tuple[int, int], ...] = ((32, 32),),
) -> Path:
    """Write rows as TRL has them: `messages` whose contents have places, and the paths of `images` (so many in row number ...)."""
    folder.mkdir(parents=True, exist_ok=True)
    choose, number = random.Random(0), 0
    with (folder / "rows.jsonl").open("w") as stream:
        for row in range(count):
            names = []
            for _ in range(images(row)):
                name = f"image{number}.png"
                draw(number, sizes[number % len(sizes)]).save(folder / name)
                names.append(name)
                number += 1
            question = " ".join(choose.choices(WORDS, k=choose.randint(1, 6)))
            content: Any = (
                [*({"type": "image"} for _ in names), {"type": "text", "text": question}] if names else question
            )
            answer = " ".join(choose.choices(WORDS, k=choose.choice([1, 2, 5, 12])))
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": messages, "images": names}) + "\n")
    return folder / "rows.jsonl"
