"""Limits of architectures that a model's `config.json` reveals, and marks on tokenizers that say what their model can do.

Both are known without loading the model, so the launcher and every rank come to the same answer.
"""

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
"""Architectures that learn a vector for each position and therefore limit the length of rows, by `model_type`.

Each has the key in `config.json` with the number of positions, the number that transformers assumes without that key, and the
positions reserved in front of the first token (RoBERTa counts from its padding token).
"""


def row_limit(values: Mapping[str, Any]) -> int | None:
    """Return the longest row, in tokens, that a model has positions for; None if its positions are computed (rotary, relative,
    ALiBi), which sets no hard limit. values: the model's `config.json`."""
    kind = str(values.get("model_type"))
    if kind not in POSITIONS or (kind.startswith("deberta") and values.get("position_biased_input") is False):
        return None
    key, default, reserved = POSITIONS[kind]
    positions = values.get(key, default)
    return positions - reserved if isinstance(positions, int) and positions > reserved else None


MAX_LAYERS = 2_000
"""Largest accepted number of layers of a model."""
MAX_EXPERTS = 100_000
"""Largest accepted number of experts of a layer."""
MAX_SIZE = 2**31
"""Largest accepted size of a dimension, in elements."""
_LIMITS = (
    (re.compile(r"(.*_)?(size|dim|heads|embd|ff|model|inner)(_per_\w+)?"), MAX_SIZE),
    (re.compile(r".*expert.*"), MAX_EXPERTS),
    (re.compile(r".*layer.*|depth"), MAX_LAYERS),
)
"""Limits of numbers in a `config.json` by their keys; the first that matches applies."""
_BY_LAYER = re.compile(r"pattern|layers?_|_layers?")
"""Keys of lists or texts with an entry for each layer."""
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""Sizes that have to be whole numbers where they are given."""


def size_problems(values: Mapping[str, Any], where: str = "model.path", value: str = "") -> list[Problem]:
    """Return a problem for each impossible number in a `config.json`: building or planning such a model would never end.

    values: its content. where, value: the key that chose the model, and its value, for the problems.
    """
    problems = []

    def refuse(key: str, number: object, reason: str) -> None:
        text = f"its config.json has {key} = {str(number)[:30]}, which is {reason}"
        problems.append(Problem(where, text, "choose a model with a correct config.json", value))

    for key, number in ((str(key), number) for key, number in values.items()):  # `id2label` has numbers for keys
        if isinstance(number, dict):
            problems += size_problems(number, where, value)
        if isinstance(number, (str, list)) and _BY_LAYER.search(key) and len(number) > MAX_LAYERS:
            refuse(key, f"{len(number):,} layers", f"more than {MAX_LAYERS:,}")
        if key in _REQUIRED and not _is_whole(number):
            refuse(key, number, "no whole number")
            continue
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        limit = next((limit for keys, limit in _LIMITS if keys.fullmatch(key)), math.inf)
        least = 0 if key.startswith("num_") or key in _REQUIRED else -math.inf
        if number > limit or number < least:
            refuse(key, number, f"more than {limit:,}" if number > limit else "less than 0")
    return problems


def _is_whole(number: object) -> bool:
    """Return whether the value of a size is no text, truth value or fraction. Some models have a list or a table of sizes."""
    if isinstance(number, float):
        return number.is_integer()
    return not isinstance(number, (str, bool))


ENCODERS = frozenset(
    {"albert", "bert", "bert-generation", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2"}
    | {"distilbert", "electra", "ernie", "esm", "esmc", "eurobert", "flaubert", "fnet", "funnel", "gte", "ibert"}
    | {"jina_embeddings_v3", "layoutlm", "layoutlmv3", "lilt", "longformer", "luke", "megatron-bert", "mobilebert"}
    | {"modernbert", "mpnet", "mra", "nomic_bert", "nystromformer", "rembert", "roberta", "roberta-prelayernorm"}
    | {"roc_bert", "roformer", "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso"}
)
"""Architectures whose positions read the tokens after them too, unless their `config.json` says otherwise, by `model_type`."""


def is_encoder(values: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` says that positions of the model read the tokens after them. values: its content."""
    if values.get("use_bidirectional_attention") in (True, "all") or values.get("is_causal") is False:
        return True
    return values.get("model_type") in ENCODERS and not (values.get("is_decoder") or values.get("causal"))


def encoder_problem(model: ModelConfig, reason: str) -> Problem:
    """Return the problem that a task which writes text cannot train the model, whose positions read later tokens."""
    fix = "model=smollm2 or another decoder (`dstune models task=chat`), or task=classification, which trains encoders"
    reason = f"{reason}: it would be trained with the answers in sight and could not write them"
    return Problem("model.path", reason, fix, model.path)


def encoder_decoder_problem(model: ModelConfig, architecture: str) -> Problem:
    """Return the problem that the task cannot train an encoder-decoder (T5, BART, ...)."""
    reason = f"{architecture} is an encoder-decoder, which task=seq2seq trains and no other"
    fix = "task=seq2seq, or choose a decoder (task=chat, task=causal_lm) or an encoder (task=classification)"
    return Problem("model.path", reason, fix, model.path)


def noisy_encoder_decoder_problem(architecture: str, alpha: float) -> Problem:
    """Return the problem that NEFTune's noise is defined for the one row that a decoder reads, not for a source and a target."""
    reason = f"{architecture} is an encoder-decoder, and NEFTune was measured for decoders only"
    return Problem("model.neftune_alpha", reason, "model.neftune_alpha=0", f"{alpha:g}")


def packed_encoder_decoder_problem(architecture: str) -> Problem:
    """Return the problem that the rows of an encoder-decoder cannot be packed, since each target belongs to one source."""
    reason = f"{architecture} is an encoder-decoder: the decoder would attend to the sources of all samples in a row"
    return Problem("data.packing", reason, "data.packing=false", "true")


def mark_encoder_decoder(tokenizer: Any) -> None:
    """Mark a tokenizer as that of an encoder-decoder, which decides what its samples look like."""
    tokenizer.dstune_encoder_decoder = True


def is_encoder_decoder(tokenizer: Any) -> bool:
    """Return whether a tokenizer was marked as that of an encoder-decoder."""
    return bool(getattr(tokenizer, "dstune_encoder_decoder", False))


def mark_stops(tokenizer: Any, stops: Collection[int]) -> None:
    """Mark a tokenizer with the ids at which its model's generation settings stop; they decide how much of a turn is trained."""
    tokenizer.dstune_stops = tuple(sorted(stops))


def marked_stops(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids at which the generation settings of a tokenizer's model stop; empty if they are not known."""
    return tuple(getattr(tokenizer, "dstune_stops", ()))


PROCESSOR_SETTINGS = ("processor_config.json", "preprocessor_config.json")
"""Files that describe how images become inputs; a model that reads images has at least one of them."""


@dataclass(frozen=True)
class VisionFiles:
    """Says where the image processor of a model is, and what its inputs depend on."""

    path: str
    """Folder, or hub id in the cache."""
    revision: str | None
    trust_remote_code: bool
    model_type: str
    settings: str = ""
    """The content of the processor's files as one text; empty if it has none."""
    merge: int = 1
    """Side of the square of patches that becomes one token (`spatial_merge_size`)."""

    @property
    def has_processor(self) -> bool:
        """Whether the model's folder has files of a processor."""
        return bool(self.settings)

    def sees_as(self, other: VisionFiles | None) -> bool:
        """Return whether `other` turns the same images into the same inputs."""
        settings = (self.model_type, self.settings, self.merge)
        return other is not None and settings == (other.model_type, other.settings, other.merge)


def mark_vision(tokenizer: Any, vision: VisionFiles) -> None:
    """Mark a tokenizer as that of a model that reads images, so conversations may contain them."""
    tokenizer.dstune_vision = vision


def vision_of(tokenizer: Any) -> VisionFiles | None:
    """Return where the image processor of a tokenizer's model is; None for a model that reads no images."""
    files: VisionFiles | None = getattr(tokenizer, "dstune_vision", None)
    return files
