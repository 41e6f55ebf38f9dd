"""The architectures of the presets: each one is there, and has as many parameters as are stated for the model (by hand)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dstune.config.architectures import size_problems
from dstune.config.convert import load
from dstune.models.inventory import inventory
from dstune.planning import counted
from dstune.planning.architecture import BODY, CLASSIFIER, LANGUAGE_MODEL, architecture, is_known
from dstune.planning.published import CONFIGS
from dstune.planning.published_today import TODAY, Published

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
        if is_known(CONFIGS[path]):
            assert architecture(CONFIGS[path], CLASSIFIER).parameters > 10_000_000


COUNTED = {
    "Qwen/Qwen3.5-0.8B": 752_393_024,
    "Qwen/Qwen3.5-2B": 1_881_825_088,
    "Qwen/Qwen3.5-4B": 4_205_751_296,
    "Qwen/Qwen3.5-9B": 8_953_803_264,
    "Qwen/Qwen3.5-27B": 26_895_998_464,
    "Qwen/Qwen3.5-35B-A3B": 34_660_610_688,
    "Qwen/Qwen3.5-397B-A17B": 396_346_350_336,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 79_674_391_296,
    # Without keys and values of layers that share those of others, which the files have: 21 and 31 million.
    "google/gemma-3n-E2B-it": 4_435_182_688,
    "google/gemma-3n-E4B-it": 6_835_235_568,
    "google/gemma-4-E2B-it": 4_628_569_344,
    "google/gemma-4-E4B-it": 7_463_013_376,
    "google/gemma-4-26B-A4B-it": 25_233_141_760,
    "google/gemma-4-31B-it": 30_697_345_280,
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": 3_429_006_336,
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": 8_489_553_920,
    "mistralai/Ministral-3-14B-Instruct-2512-BF16": 13_506_073_600,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "zai-org/GLM-4.7-Flash": 29_943_390_976,
    "zai-org/GLM-4.5-Air": 106_852_245_504,
    "zai-org/GLM-4.7": 352_797_814_784,
    "zai-org/GLM-5": 743_911_199_232,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
    "allenai/Olmo-3.1-32B-Instruct": 32_233_522_176,
    "ibm-granite/granite-4.0-micro": 3_402_836_480,
    "ibm-granite/granite-4.0-h-micro": 3_191_396_096,
    "ibm-granite/granite-4.0-h-tiny": 6_939_037_248,
    "LiquidAI/LFM2-350M": 354_483_968,
    "LiquidAI/LFM2-1.2B": 1_170_340_608,
    "LiquidAI/LFM2-2.6B": 2_569_272_320,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31_577_937_344,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": 107_769_861_120,
    "moonshotai/Kimi-K2-Instruct-0905": 1_026_408_209_408,
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": 49_133_074_464,
    "MiniMaxAI/MiniMax-M2": 228_689_748_992,
    "MiniMaxAI/MiniMax-M2.1": 228_689_748_992,
    "deepseek-ai/DeepSeek-V3.2": 671_877_929_216,
    # 671,026,419,200 with the 58 x 256 corrections of expert scores, which are buffers.
    "deepseek-ai/DeepSeek-R1-0528": 671_026_404_352,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Qwen/Qwen3.6-27B": 26_895_998_464,
    "Qwen/Qwen3.6-35B-A3B": 34_660_610_688,
    "Qwen/Qwen3.8-27B": 26_895_998_464,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": 30_532_122_624,
    "Qwen/Qwen3-VL-2B-Instruct": 1_720_574_976,
    "Qwen/Qwen3-VL-8B-Instruct": 8_190_735_360,
    "google/gemma-3-4b-it": 3_880_263_168,
    "google/gemma-3-12b-it": 11_766_034_176,
    "google/gemma-3-27b-it": 27_009_346_304,
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": 23_572_403_200,
    "mistralai/Mistral-Small-4-119B-2603": 118_435_955_712,
    "zai-org/GLM-4.6": 352_797_814_784,
    "LiquidAI/LFM2-8B-A1B": 8_339_929_856,
    "LiquidAI/LFM3-1.7B": 1_728_801_536,
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": 120_668_687_360,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "moonshotai/Kimi-K2.6": 1_025_233_804_288,
    "MiniMaxAI/MiniMax-M2.5": 228_689_748_992,
    "MiniMaxAI/MiniMax-M2.7": 228_689_748_992,
    "deepseek-ai/DeepSeek-V4-Flash": 284_325_869_015,
    "google/embeddinggemma-300m": 302_863_104,
    "Qwen/Qwen3-Embedding-0.6B": 595_776_512,
    "Qwen/Qwen3-Embedding-4B": 4_021_774_336,
    "Qwen/Qwen3-Reranker-0.6B": 595_776_512,
}
"""Parameters that text reaches."""


SOME = ("Qwen/Qwen3.5-4B", "google/gemma-4-26B-A4B-it", "openai/gpt-oss-20b", "ibm-granite/granite-4.0-h-tiny")
"""Of each kind one: those of all are counted in half a minute."""


@pytest.mark.parametrize(
    "model",
    [pytest.param(model, marks=() if model.path in SOME else pytest.mark.ci, id=model.path) for model in TODAY],
)
def test_models_of_today_have_as_many_parameters_as_their_makers_say(model: Published) -> None:
    """Of towers that text never reaches too; a name that says 4B may mean 4.5, one with a digit behind the point means it."""
    found = counted.from_inventory(inventory(model.config, LANGUAGE_MODEL, 2))
    billions = (found.parameters + (found.unreached or 0)) / 1e9
    # Qwen 3.5 9B has 9.41 with its tower: names of few billions are rounded to whole ones.
    rounded = 0.15 * model.billions if model.billions < 5 else 0.5 if model.billions < 15 else 0.03 * model.billions
    assert billions == pytest.approx(model.billions, abs=rounded)
    assert found.parameters == COUNTED[model.path]


def test_sizes_of_real_models_are_accepted() -> None:
    assert not [problem for model in TODAY for problem in size_problems(model.config)]
    assert not size_problems({"vocab_size_per_layer_input": 262144, "num_experts": 16384})  # of Gemma 3n and 4, of Doge
    assert (
        len(size_problems({"num_experts": 10**6, "num_hidden_layers": 10**5, "vocab_size_per_layer_input": 2**40})) == 3
    )


def test_each_model_of_today_has_a_source() -> None:
    assert len(TODAY) >= 30 and len({model.path for model in TODAY}) == len(TODAY)
    for model in TODAY:
        assert (
            re.match(r"(huggingface|github|docs\.nvidia|inference\.readthedocs)\.(com?|io)/", model.source)
            and model.licence
            and model.year >= 2024
        )
        assert model.verified in ("", "2026-12-01", "2026-12-03")
    assert sum(not model.verified for model in TODAY) <= 25, "those without a date are wholly or partly from memory"
