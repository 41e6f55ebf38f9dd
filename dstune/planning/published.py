"""Architectures of the presets' models, so that `dstune plan model=NAME` needs neither hub nor weights.

The numbers were entered by hand after the models' published descriptions, not fetched: a `config.json` that is found (in a
folder, or in the hub's cache) always comes before them. `tests/unit/test_plan_published.py` holds their parameter counts
against those that are stated for the models, entered by hand as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstune.planning.published_today import TODAY, Published, decoder_config


def _llama(*numbers: int, **fields: Any) -> dict[str, Any]:
    return decoder_config("llama", *numbers, **({"tie_word_embeddings": False} | fields))


_TIED = {"tie_word_embeddings": True}
_LLAMA_1B = _llama(128256, 2048, 8192, 16, 32, 8, head_dim=64, **_TIED)
_LLAMA_8B = _llama(128256, 4096, 14336, 32, 32, 8)
_LLAMA_70B = _llama(128256, 8192, 28672, 80, 64, 8)
_MISTRAL_7B = decoder_config("mistral", 32768, 4096, 14336, 32, 32, 8, sliding_window=None)
_MIXTRAL = decoder_config("mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2)
_NEMO_12B = decoder_config("mistral", 131072, 5120, 14336, 40, 32, 8, head_dim=128, sliding_window=None)
_SMALL_24B = decoder_config("mistral", 131072, 5120, 32768, 40, 32, 8, head_dim=128, sliding_window=None)
_GEMMA2_2B = decoder_config("gemma2", 256000, 2304, 9216, 26, 8, 4, head_dim=256, sliding_window=4096)
_GEMMA2_9B = decoder_config("gemma2", 256000, 3584, 14336, 42, 16, 8, head_dim=256, sliding_window=4096)
_GEMMA2_27B = decoder_config("gemma2", 256000, 4608, 36864, 46, 32, 16, head_dim=128, sliding_window=4096)
_GEMMA3_270M = decoder_config("gemma3_text", 262144, 640, 2048, 18, 4, 1, head_dim=256, sliding_window=512)
_GEMMA3_1B = decoder_config("gemma3_text", 262144, 1152, 6912, 26, 4, 1, head_dim=256, sliding_window=512)
_SMOLLM2_135M = _llama(49152, 576, 1536, 30, 9, 3, **_TIED)
_SMOLLM2_360M = _llama(49152, 960, 2560, 32, 15, 5, **_TIED)
_SMOLLM2_1_7B = _llama(49152, 2048, 8192, 24, 32, 32, **_TIED)
_SMOLLM3 = decoder_config("smollm3", 128256, 2048, 11008, 36, 16, 4, **_TIED)


def _qwen2(*numbers: int, tied: bool) -> dict[str, Any]:
    return decoder_config("qwen2", *numbers, tie_word_embeddings=tied)


def _qwen3(*numbers: int, tied: bool) -> dict[str, Any]:
    return decoder_config("qwen3", 151936, *numbers, head_dim=128, tie_word_embeddings=tied)


_QWEN3_30B = decoder_config(
    "qwen3_moe",
    151936,
    2048,
    6144,
    48,
    32,
    4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    tie_word_embeddings=False,
)


def _bert(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return decoder_config(
        "bert", 30522, hidden, inner, layers, heads, heads, max_position_embeddings=512, hidden_dropout_prob=0.1
    )


def _t5(hidden: int, inner: int, layers: int, heads: int, *, gated: bool = False) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": hidden,
        "d_ff": inner,
        "d_kv": 64,
        "num_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "dropout_rate": 0.1,
    }


def _bart(vocabulary: int, hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {
        f"{part}_{size_name}": n
        for part in ("encoder", "decoder")
        for size_name, n in (("layers", layers), ("ffn_dim", inner))
    }
    attention = {f"{part}_attention_heads": heads for part in ("encoder", "decoder")}
    fields = {"d_model": hidden, "max_position_embeddings": 1024, "dropout": 0.1}
    return {"model_type": "bart", "vocab_size": vocabulary, **sizes, **attention, **fields}


def _deberta(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return decoder_config(
        "deberta-v2",
        128100,
        hidden,
        inner,
        layers,
        heads,
        heads,
        max_position_embeddings=512,
        position_buckets=256,
        relative_attention=True,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=0.1,
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "sample://smollm2": _SMOLLM2_135M,
    "sample://gemma3": _GEMMA3_270M,
    "sample://minilm": _bert(384, 1536, 6, 12),
    "meta-llama/Llama-3.2-1B": _LLAMA_1B,
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_1B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B,
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _MIXTRAL,
    "mistralai/Mistral-Nemo-Base-2407": _NEMO_12B,
    "mistralai/Mistral-Nemo-Instruct-2407": _NEMO_12B,
    "mistralai/Mistral-Small-24B-Base-2501": _SMALL_24B,
    "mistralai/Mistral-Small-24B-Instruct-2501": _SMALL_24B,
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(151936, 896, 4864, 24, 14, 2, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2(151936, 1536, 8960, 28, 12, 2, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen2(151936, 2048, 11008, 36, 16, 2, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(152064, 3584, 18944, 28, 28, 4, tied=False),
    "Qwen/Qwen2.5-14B-Instruct": _qwen2(152064, 5120, 13824, 48, 40, 8, tied=False),
    "Qwen/Qwen2.5-32B-Instruct": _qwen2(152064, 5120, 27648, 64, 40, 8, tied=False),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, 8, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, 8, tied=False),
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "google/gemma-2-2b": _GEMMA2_2B,
    "google/gemma-2-2b-it": _GEMMA2_2B,
    "google/gemma-2-9b": _GEMMA2_9B,
    "google/gemma-2-9b-it": _GEMMA2_9B,
    "google/gemma-2-27b": _GEMMA2_27B,
    "google/gemma-2-27b-it": _GEMMA2_27B,
    "google/gemma-3-270m": _GEMMA3_270M,
    "google/gemma-3-270m-it": _GEMMA3_270M,
    "google/gemma-3-1b-pt": _GEMMA3_1B,
    "google/gemma-3-1b-it": _GEMMA3_1B,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-360M": _SMOLLM2_360M,
    "HuggingFaceTB/SmolLM2-360M-Instruct": _SMOLLM2_360M,
    "HuggingFaceTB/SmolLM2-1.7B": _SMOLLM2_1_7B,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _SMOLLM2_1_7B,
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3,
    "HuggingFaceTB/SmolLM3-3B-Base": _SMOLLM3,
    "google-bert/bert-base-uncased": _bert(768, 3072, 12, 12),
    "google-bert/bert-large-uncased": _bert(1024, 4096, 24, 16),
    "microsoft/deberta-v3-base": _deberta(768, 3072, 12, 12),
    "microsoft/deberta-v3-large": _deberta(1024, 4096, 24, 16),
    "answerdotai/ModernBERT-base": decoder_config("modernbert", 50368, 768, 1152, 22, 12, 12),
    "answerdotai/ModernBERT-large": decoder_config("modernbert", 50368, 1024, 2624, 28, 16, 16),
    "google-t5/t5-small": _t5(512, 2048, 6, 8),
    "google-t5/t5-base": _t5(768, 3072, 12, 12),
    "google-t5/t5-large": _t5(1024, 4096, 24, 16),
    "google/flan-t5-small": _t5(512, 1024, 8, 6, gated=True),
    "google/flan-t5-base": _t5(768, 2048, 12, 12, gated=True),
    "google/flan-t5-large": _t5(1024, 2816, 24, 16, gated=True),
    "facebook/bart-base": _bart(50265, 768, 3072, 6, 12),
    "facebook/bart-large-cnn": _bart(50264, 1024, 4096, 12, 16),
}
CONFIGS |= {model.path: model.config for model in TODAY}


@dataclass(frozen=True)
class Facts:
    """What the catalogue says of an earlier model, beside its sizes in `CONFIGS`. The fields are those of `Published`."""

    licence: str
    year: int
    context: int
    source: str
    gated: bool = False
    modality: str = "text"
    use: str = "chat"
    verified: str = ""
    """Empty: these models' licences, years and contexts were written down from memory."""


_MAKERS = {
    "meta-llama/Llama-3.1": ("llama3.1", 2024, 131072, True),
    "meta-llama/Llama-3.2": ("llama3.2", 2024, 131072, True),
    "meta-llama/Llama-3.3": ("llama3.3", 2024, 131072, True),
    "mistralai/Mistral-7B": ("apache-2.0", 2024, 32768, False),
    "mistralai/Mixtral": ("apache-2.0", 2023, 32768, False),
    "mistralai/Mistral-Nemo": ("apache-2.0", 2024, 131072, False),
    "mistralai/Mistral-Small-24B": ("apache-2.0", 2025, 32768, False),
    "Qwen/Qwen2.5-3B": ("qwen-research", 2024, 32768, False),  # unlike the other sizes
    "Qwen/Qwen2.5": ("apache-2.0", 2024, 32768, False),
    "Qwen/Qwen3": ("apache-2.0", 2025, 40960, False),
    "google/gemma-2": ("gemma", 2024, 8192, True),
    "google/gemma-3": ("gemma", 2025, 32768, True),
    "HuggingFaceTB/SmolLM2": ("apache-2.0", 2024, 8192, False),
    "HuggingFaceTB/SmolLM3": ("apache-2.0", 2025, 65536, False),
    "google-bert/bert": ("apache-2.0", 2018, 512, False),
    "microsoft/deberta-v3": ("mit", 2021, 512, False),
    "answerdotai/ModernBERT": ("apache-2.0", 2024, 8192, False),
    "google-t5/t5": ("apache-2.0", 2019, 512, False),
    "google/flan-t5": ("apache-2.0", 2022, 512, False),
    "facebook/bart-large-cnn": ("mit", 2020, 1024, False),
    "facebook/bart": ("apache-2.0", 2019, 1024, False),
}
"""Licence, year, context and whether access must be requested, by the start of a path; the first that matches."""


def _facts(path: str) -> Facts | None:
    return next(
        (
            Facts(licence, year, context, f"huggingface.co/{path}", gated)
            for start, (licence, year, context, gated) in _MAKERS.items()
            if path.startswith(start)
        ),
        None,
    )


PUBLISHED: dict[str, Published | Facts] = {path: facts for path in CONFIGS if (facts := _facts(path)) is not None}
PUBLISHED |= {model.path: model for model in TODAY}
"""Licence, year, context and kind of every model in `CONFIGS` that the hub has, by its path."""
