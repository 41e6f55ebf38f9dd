"""The architectures of the presets: each one is there, and has as many parameters as are stated for the model (by hand)."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstune.config.convert import load
from dstune.planning.architecture import BODY, CLASSIFIER, LANGUAGE_MODEL, architecture
from dstune.planning.published import CONFIGS

ROOT = Path(__file__).parents[2]

# Of safetensors' metadata, or of the model card; a tied projection counts once.
PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-270m": 268_098_176,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "google-t5/t5-small": 60_506_624,
    "google-t5/t5-base": 222_903_552,
    "google-t5/t5-large": 737_668_096,
    "facebook/bart-base": 139_420_416,
    "google-bert/bert-base-uncased": 109_482_240,
    "google-bert/bert-large-uncased": 335_141_888,
    "sample://minilm": 22_713_216,
}
BODIES = ("google-bert", "sample://minilm")


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_page(name: str) -> None:
    head = BODY if name.startswith(BODIES) else LANGUAGE_MODEL
    assert architecture(CONFIGS[name], head).parameters == PARAMETERS[name]


def test_every_preset_can_be_planned_offline() -> None:
    for preset in sorted((ROOT / "conf" / "model").glob("*.yaml")):
        path = load(preset.read_text(encoding="utf-8"), str(preset))["path"]
        assert path in CONFIGS, f"{preset.name}: add the numbers of {path} to dstune/planning/published.py"
        assert architecture(CONFIGS[path], CLASSIFIER).parameters > 10_000_000
