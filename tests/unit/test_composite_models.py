"""Models of several parts that transformers builds, stores and computes differently: those of sound, for example."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from support.tiny import save_decoder
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM

from dstune.config.schema import ModelConfig
from dstune.models.attention import SamplesApart, implementations_of
from dstune.models.mapped import Mapped
from dstune.models.partitioned_loading import corrected_partitioned_loading


def tiny(kind: str, model_class: Any = AutoModelForSeq2SeqLM) -> Any:
    from tiny_architectures import build, small_config

    return build(model_class, small_config(kind))


def test_a_model_gets_back_the_attention_of_each_part() -> None:
    model = tiny("vibevoice_asr")  # its encoders of sound have no attention, and refuse to be given "sdpa"
    loaded = implementations_of(model.config)
    rows = SamplesApart(model)
    installed = implementations_of(model.config)
    assert installed[""] == installed["text_config"][""] == SamplesApart.NAME != loaded[""]
    with rows.original_attention():
        assert implementations_of(model.config) == loaded
    assert implementations_of(model.config) == installed


def test_weights_that_a_part_joins_are_not_mapped(tmp_path: Path) -> None:
    tiny("dots3_note", AutoModelForMultimodalLM).save_pretrained(tmp_path / "parts")  # only those of its vision encoder
    save_decoder(tmp_path / "plain")
    architectures = {name: AutoConfig.from_pretrained(tmp_path / name) for name in ("parts", "plain")}
    mapped = {name: Mapped.of(ModelConfig(path=str(tmp_path / name)), architectures[name]) for name in architectures}
    assert mapped["parts"] is None and mapped["plain"] is not None


def test_loaded_weights_without_a_shape_are_not_initialized() -> None:
    model = tiny("nemo_speechlm")
    for module in model.modules():
        module._is_hf_initialized = False
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True
    convolution = model.model.audio_tower.diarization_model.model.upsampler.conv
    convolution.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with corrected_partitioned_loading():
        model.initialize_weights()
    for module in model.modules():
        module._is_hf_initialized = False
    with pytest.raises(IndexError):  # without the correction
        model.initialize_weights()


def test_the_code_of_each_part_is_imported() -> None:
    program = """
import sys
from transformers import AutoConfig
from dstune.models.partitioned_loading import import_parts
part = "transformers.models.nemotron_h.modeling_nemotron_h"
architecture = AutoConfig.for_model("nemo_speechlm")
assert part not in sys.modules
import_parts(architecture)
assert part in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
