"""What `architectures.py` tries: the cases, their order, and the file that has a line for each that is done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from architecture_variants import VARIANTS

GROUPS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}

FEWER = {
    "causal": (("full", True, 3), ("lora", False, 3), ("full", False, 0), ("lora", True, 0)),
    "classification": (("full", False, 3), ("lora", False, 0)),
    "seq2seq": (("full", False, 3), ("lora", False, 3), ("full", False, 0)),
}
"""(method, packed, ZeRO stage): each value with each other one, or nearly so."""

USUAL = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_text",
    "qwen3_next",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "mistral",
    "ministral3",
    "mixtral",
    "gpt_oss",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
    "granitemoehybrid",
    "lfm2",
    "lfm2_moe",
    "nemotron",
    "nemotron_h",
    "phi",
    "phi3",
    "phimoe",
    "llama4",
    "llama4_text",
    "kimi_linear",
    "minimax",
    "minimax_m2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "gpt2",
    "gpt_neox",
    "falcon",
    "falcon_h1",
    "bloom",
    "opt",
    "mamba",
    "mamba2",
    "jamba",
    "cohere2",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "hunyuan_v1_dense",
    "seed_oss",
    "starcoder2",
    "bert",
    "roberta",
    "xlm-roberta",
    "modernbert",
    "deberta-v2",
    "distilbert",
    "electra",
    "albert",
    "eurobert",
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
    "t5gemma",
    "marian",
    "m2m_100",
]
"""Those that people train today come first."""


@dataclass(frozen=True)
class Case:
    group: str
    kind: str
    method: str
    packed: bool
    stage: int

    @property
    def name(self) -> str:
        return f"{self.group}-{self.kind}-{self.method}-{'packed' if self.packed else 'padded'}-{self.stage}"


def all_cases(kinds: list[str] | None, part: str | None, every: bool) -> list[Case]:
    """Return the first combination of every kind, then the second of every kind, and so on.

    kinds: GROUP:KIND or KIND. part: `3/8` is the third
    of eight."""
    from transformers.models.auto import modeling_auto

    pairs = [
        (group, kind)
        for group, mapping in GROUPS.items()
        for kind in (*getattr(modeling_auto, mapping), *VARIANTS[group])
        if kinds is None or kind in kinds or f"{group}:{kind}" in kinds
    ]
    pairs.sort(key=lambda pair: pair[1].partition("@")[0] not in USUAL)
    if part:
        number, parts = map(int, part.split("/"))
        pairs = pairs[number - 1 :: parts]
    chosen = {group: every_combination(group) if every else FEWER[group] for group in GROUPS}
    return [
        Case(group, kind, *chosen[group][turn])
        for turn in range(max(map(len, chosen.values())))
        for group, kind in pairs
        if turn < len(chosen[group])
    ]


def every_combination(group: str) -> tuple[tuple[str, bool, int], ...]:
    packings = (False, True) if group == "causal" else (False,)
    return tuple((method, packed, stage) for method in ("full", "lora") for packed in packings for stage in (0, 3))


def model_class_of(case: Case, config: Any) -> Any:
    """Return the class that a published checkpoint of this configuration names."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTextToWaveform,
    )

    if case.group == "classification":
        return AutoModelForSequenceClassification
    if case.group == "seq2seq":
        return AutoModelForSeq2SeqLM
    if getattr(config, "text_config", None) is not None and type(config) in AutoModelForMultimodalLM._model_mapping:
        return AutoModelForMultimodalLM
    if type(config) in AutoModelForTextToWaveform._model_mapping:
        return AutoModelForTextToWaveform
    return AutoModelForCausalLM


def note(state: Path, case: Case, result: dict[str, Any]) -> None:
    with state.open("a") as stream:
        stream.write(json.dumps({"case": asdict(case), **result}) + "\n")


def read_state(state: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each case, by its name."""
    lines = state.read_text().splitlines() if state.is_file() else []
    entries = [json.loads(line) for line in lines]
    return {Case(**entry["case"]).name: entry for entry in entries}
