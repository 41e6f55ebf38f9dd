"""The real vLLM with images, proven against transformers: `DSTUNE_VLLM_PYTHON=/opt/vllm/bin/python pytest -m slow ...`."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.config.schema import ModelConfig
from dstune.inference.reference import base_reference
from dstune.serve.engines.base import Limits
from dstune.serve.engines.vllm import VllmEngine
from dstune.serve.parity import Proof, prove
from dstune.serve.source import resolve
from tests.serve.local.test_images import url
from tests.support.sight import draw, qwen2_5_vl
from tests.unit.test_image_rows import file_of

WORDS = "w1 w2"


def save_wide(folder: Path) -> None:
    """Save a Qwen2.5-VL with heads of 32: vLLM's attention on CPUs takes no smaller ones."""
    from transformers import AutoModelForImageTextToText

    processor, tokenizer, config = qwen2_5_vl()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    for name, value in {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05, **heads}.items():
        setattr(config.text_config, name, value)
    config.text_config.rope_parameters["mrope_section"] = [8, 4, 4]
    config.vision_config.out_hidden_size = config.vision_config.hidden_size = 64
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_vllm_sees_what_transformers_sees(tmp_path: Path) -> None:
    """Its log-probabilities after an image are those of transformers, and both routes answer about one."""
    python = os.environ.get("DSTUNE_VLLM_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("needs vLLM in an environment of its own: DSTUNE_VLLM_PYTHON=/path/to/its/bin/python")
    folder = tmp_path / "model"
    save_wide(folder)
    (tmp_path / "reference.json").write_text(json.dumps(base_reference(ModelConfig(path=str(folder)))))
    source = replace(resolve("base", str(folder)), reference=tmp_path)
    words = ["--enforce-eager", "--max-model-len", "512", "--gpu-memory-utilization", "0.3"]
    picture = url(file_of(draw(3)))

    async def main(short: str) -> tuple[Proof, list[Any]]:
        limits = Limits(threads=1, start_seconds=1200)
        place = (source, "base", tmp_path, Path(short), limits)
        engine = VllmEngine(*place, python=python, number_format="float32", arguments=words)

        async def asked(path: str, **fields: Any) -> dict[str, Any]:
            body = engine.outgoing(path, {"model": "base", "temperature": 0, **fields})
            return await engine.ask("POST", path, body)

        try:
            await engine.start()
            proof = await prove(engine, "base", source)
            parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": WORDS}]
            messages = [{"role": "user", "content": parts}]
            chat = await asked("/v1/chat/completions", messages=messages, max_tokens=6)
            parts = [{"type": "input_image", "image_url": picture}, {"type": "input_text", "text": WORDS}]
            given = [{"role": "user", "content": parts}]
            response = await asked("/v1/responses", input=given, max_output_tokens=6)
        finally:
            await engine.stop(10)
        texts = [chat["choices"][0]["message"]["content"], response["output"][0]["content"][0]["text"]]
        return proof, texts

    tmp_path.chmod(0o700)
    with tempfile.TemporaryDirectory(prefix="dstune-test-") as short:
        proof, (said, responded) = asyncio.run(main(short))
    assert (proof.status, proof.rows) == ("proven", 9) and proof.difference is not None and proof.difference < 1e-4
    assert proof.detail.startswith("1 of these rows show images")
    assert said and said == responded
