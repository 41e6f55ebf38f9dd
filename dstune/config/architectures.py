"""Architectures that not every task can train: known from a model's `config.json`, so by the launcher and by every rank."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem

POSITIONS = {
    "albert": ("max_position_embeddings", 512, 0),
    "bart": ("max_position_embeddings", 1024, 0),
    "bert": ("max_position_embeddings", 512, 0),
    "camembert": ("max_position_embeddings", 512, 2),
    "convbert": ("max_position_embeddings", 512, 0),
    "deberta": ("max_position_embeddings", 512, 0),
    "deberta-v2": ("max_position_embeddings", 512, 0),
    "distilbert": ("max_position_embeddings", 512, 0),
    "electra": ("max_position_embeddings", 512, 0),
    "ernie": ("max_position_embeddings", 512, 0),
    "gpt2": ("n_positions", 1024, 0),
    "gpt_neo": ("max_position_embeddings", 2048, 0),
    "layoutlm": ("max_position_embeddings", 512, 0),
    "mbart": ("max_position_embeddings", 1024, 0),
    "mobilebert": ("max_position_embeddings", 512, 0),
    "mpnet": ("max_position_embeddings", 512, 2),
    "opt": ("max_position_embeddings", 2048, 0),
    "roberta": ("max_position_embeddings", 512, 2),
    "roberta-prelayernorm": ("max_position_embeddings", 512, 2),
    "xlm-roberta": ("max_position_embeddings", 512, 2),
    "xlm-roberta-xl": ("max_position_embeddings", 514, 2),
}
"""Architectures with a learned vector for each position, and so no more of them: the key in `config.json`, what transformers
assumes without it, and how many come before the first token (RoBERTa counts from its padding token)."""


def row_limit(values: Mapping[str, Any]) -> int | None:
    """Return the longest row in tokens that the model of this `config.json` takes; None where positions are computed (rotary,
    relative, ALiBi), so that a longer row is another question."""
    kind = str(values.get("model_type"))
    if kind not in POSITIONS or (kind.startswith("deberta") and values.get("position_biased_input") is False):
        return None
    key, usual, reserved = POSITIONS[kind]
    positions = values.get(key, usual)
    return positions - reserved if isinstance(positions, int) and positions > reserved else None


MAX_LAYERS = 10_000
"""Of a model, and of experts in a layer."""
MAX_SIZE = 2**31
"""Of a dimension, in elements."""
_SIZE = re.compile(r".*(_size|_dim|_heads|_embd|_ff|_model|_inner)")


def size_problems(values: Mapping[str, Any], where: str = "model.path", value: str = "") -> list[Problem]:
    """Return the problems with numbers in a `config.json` that no model has: building or planning such a model would never end."""
    problems = []
    for key, number in values.items():
        if isinstance(number, dict):
            problems += size_problems(number, where, value)
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        limit = MAX_SIZE if _SIZE.fullmatch(key) else MAX_LAYERS if "layer" in key or "expert" in key else math.inf
        least = 0 if key.startswith("num_") else -math.inf
        if number > limit or number < least:
            bound = f"more than {limit:,}" if number > limit else "fewer than none"
            reason = f"its config.json has {key} = {str(number)[:30]}, and no model has {bound}"
            problems.append(Problem(where, reason, "a model whose config.json is right", value))
    return problems


def encoder_decoder_problem(model: ModelConfig, architecture: str) -> Problem:
    """Return the problem with a model (T5, BART, ...) that reads one text and writes another, under another task."""
    reason = f"{architecture} is an encoder-decoder, which task=seq2seq trains and no other"
    fix = "task=seq2seq, or choose a decoder (task=chat, task=causal_lm) or an encoder (task=classification)"
    return Problem("model.path", reason, fix, model.path)


def packed_encoder_decoder_problem(architecture: str) -> Problem:
    """Return the problem with packing for a model whose every target belongs to one source."""
    reason = f"{architecture} is an encoder-decoder: the decoder would attend to the sources of all samples in a row"
    return Problem("data.packing", reason, "data.packing=false", "true")


def mark_encoder_decoder(tokenizer: Any) -> None:
    """Note at a tokenizer that its model is an encoder-decoder: it decides what the tokenizer's samples look like."""
    tokenizer.dstune_encoder_decoder = True


def is_encoder_decoder(tokenizer: Any) -> bool:
    """Return whether the model that a tokenizer was loaded for is an encoder-decoder."""
    return bool(getattr(tokenizer, "dstune_encoder_decoder", False))


def mark_stops(tokenizer: Any, stops: Collection[int]) -> None:
    """Note at a tokenizer at which tokens its model's generation settings stop: they decide what is trained of a turn."""
    tokenizer.dstune_stops = tuple(sorted(stops))


def marked_stops(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens at which the generation settings of a tokenizer's model stop, as far as they are known."""
    return tuple(getattr(tokenizer, "dstune_stops", ()))


PROCESSOR_SETTINGS = ("processor_config.json", "preprocessor_config.json")
"""Files of which one at least says how images become inputs."""


@dataclass(frozen=True)
class VisionFiles:
    """Where the image processor of a model is, and what tells it from others."""

    path: str
    """Folder, or hub id in the cache."""
    revision: str | None
    trust_remote_code: bool
    model_type: str
    settings: str = ""
    """What the files of its processor say, as one text; empty where it has none."""
    merge: int = 1
    """So many patches in a row, and in a column, are one token (`spatial_merge_size`)."""

    @property
    def has_processor(self) -> bool:
        """Whether there are files of a processor beside the model."""
        return bool(self.settings)

    def sees_as(self, other: VisionFiles | None) -> bool:
        """Tell whether `other` makes the same inputs of the same images."""
        settings = (self.model_type, self.settings, self.merge)
        return other is not None and settings == (other.model_type, other.settings, other.merge)


def mark_vision(tokenizer: Any, vision: VisionFiles) -> None:
    """Note at a tokenizer that its model sees: conversations may hold images then."""
    tokenizer.dstune_vision = vision


def vision_of(tokenizer: Any) -> VisionFiles | None:
    """Return where the image processor of a tokenizer's model is; None for a model that sees no images."""
    files: VisionFiles | None = getattr(tokenizer, "dstune_vision", None)
    return files
