"""Every architecture of transformers as a checkpoint of a few thousand weights, made from the defaults of its configuration class
by `dstune_verify.small_configurations`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune_verify.small_configurations import (
    BY_KIND,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    VOCABULARY,
    WINDOW,
    merged,
    shrunk,
)

__all__ = ["HEADS", "HEAD_DIM", "HIDDEN", "INNER", "VOCABULARY", "WINDOW", "build", "save_letters", "small_config"]


def small_config(kind: str, variant: Mapping[str, Any] | None = None) -> Any:
    """Return the configuration of a kind with small sizes. variant: values to put in place of its defaults."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[kind]
    try:
        defaults = config_class()
    except StrictDataclassError:  # Gemma 4's assistant is no model with the defaults of its part for text
        defaults = config_class(**BY_KIND[kind])
    values = shrunk(defaults.to_dict())
    for name in ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(name, None)
    return config_class.from_dict({**merged(values, BY_KIND.get(kind, {})), **(variant or {})})


def build(model_class: Any, config: Any, seed: int = 0) -> Any:
    """Return a model of random weights; what transformers begins at zero is small noise, so that no part is without effect."""
    import torch

    torch.manual_seed(seed)
    model = model_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0.0, 0.02)
        for module in model.modules():
            # Gemma 3n divides by the length of a token's embedding: that of a padding token would be zero.
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                row = module.weight[module.padding_idx]
                if not row.any():
                    row.normal_(0.0, 0.02)
    return model.float()


def save_letters(folder: Path) -> None:
    """Save a byte-level tokenizer of at most VOCABULARY tokens for lower-case words, with ChatML as its chat template."""
    from support.tiny import WORDS
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from dstune.testing.tiny import CHATML, SPECIAL

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 8, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS), "user\nassistant\nsystem\n"] * 9, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="</s>", unk_token="<unk>", chat_template=CHATML
    ).save_pretrained(folder)
