"""The real vLLM on quantized exports, held against transformers: `DSTUNE_VLLM_PYTHON=/opt/vllm/bin/python pytest -m slow ...`."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from dstune.inference import export_command
from dstune.models.activation_rounding import round_activations
from dstune.serve.engines.base import Limits
from dstune.serve.engines.vllm import VllmEngine
from dstune.serve.source import resolve
from tests.support.generation import saved_run
from tests.support.gguf_models import MODELS, SIZES, save_byte_level
from tests.support.tiny import write_dialogues

ROWS = [[position * 37 % 270 + 3 for position in range(96)], list(range(3, 99))]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06, "head_dim": 64}
"""vLLM's attention on CPUs takes no heads below 32."""


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def run(request, tmp_path_factory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("vllm")
    size = save_byte_level(folder / "model")
    changes = MODELS[request.param.lower()][1]
    config = getattr(transformers, f"{request.param}Config")(**(SIZES | changes | WIDE | {"vocab_size": size}))
    torch.manual_seed(0)
    getattr(transformers, f"{request.param}ForCausalLM")(config).save_pretrained(folder / "model")
    rows = write_dialogues(folder / "chat.jsonl", 60)
    words = ("task=chat", "method=full", f"data.train={rows}", "data.max_length=96")
    return saved_run(folder, folder / "model", *words)


def computed_by_vllm(folder: Path, python: str, number_format: str) -> torch.Tensor:
    """Return the log-probability of each token of ROWS after those before it."""

    async def main(short: str) -> list[float]:
        place = (
            resolve("base", str(folder)),
            "base",
            folder.parent,
            Path(short),
            Limits(threads=1, start_seconds=1200),
        )
        words = ["--enforce-eager", "--max-model-len", "128"]
        engine = VllmEngine(*place, python=python, number_format=number_format, arguments=words)
        try:
            await engine.start()
            return [value for row in ROWS for value in await engine.logprobs("base", row[:1], row[1:])]
        finally:
            await engine.stop(10)

    with tempfile.TemporaryDirectory(prefix="dstune-test-") as short:
        return torch.tensor(asyncio.run(main(short)))


@torch.no_grad()
def computed_by_transformers(folder: Path, *, rounds_inputs: bool) -> torch.Tensor:
    """Return the same from the dequantized weights, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    settings = getattr(config, "quantization_config", None)
    if settings:
        settings["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    if rounds_inputs:
        assert round_activations(model, settings) == 14
    rows = torch.tensor(ROWS)
    logprobs = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)[:, :-1]
    return logprobs.gather(-1, rows[:, 1:, None]).flatten()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "number_format"), [("fp8", "float32"), ("awq", "bfloat16")])
def test_vllm_computes_what_the_export_stands_for(run, tmp_path, monkeypatch, kind: str, number_format: str) -> None:
    """In fp8 both round inputs, and differ where a value lies between two steps. In awq, vLLM computes in bf16: on a CPU it has no
    other 4-bit products."""
    python = os.environ.get("DSTUNE_VLLM_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("needs vLLM in an environment of its own: DSTUNE_VLLM_PYTHON=/path/to/its/bin/python")
    if kind == "awq":
        pytest.importorskip("auto_round", reason="pip install '.[awq]'")
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert export_command.main([str(run), "--quantize", kind, "--out", str(out), "--no-loss"]) == 0
    assert export_command.main([str(run), "--out", str(whole), "--no-reference"]) == 0
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    tmp_path.chmod(0o700)
    computed = computed_by_vllm(out, python, number_format)

    def apart(folder: Path, *, rounds_inputs: bool = False) -> float:
        return float((computed - computed_by_transformers(folder, rounds_inputs=rounds_inputs)).abs().mean())

    near = apart(out, rounds_inputs=kind == "fp8")
    far = {"the original": apart(whole), **({"whole inputs": apart(out)} if kind == "fp8" else {})}
    print(kind, near, far)
    assert all(near < distance / 10 for distance in far.values()), (near, far)
    assert near < {"fp8": 0.1, "awq": 0.3}[kind]
