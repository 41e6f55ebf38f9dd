"""Bases in FP8 and MXFP4 train as the same weights in fp32 do, at every kind of partitioning, and export in full width."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from parity.reference import train_plainly
from parity.test_ladder import PROGRAM, Workshop, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from safetensors.torch import save_file
from support.few_bits import store_in_fp8, store_in_mxfp4
from support.ranks import run_ranks
from support.tiny import save_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

STILL = "model.config_overrides={attention_dropout:0.0}"


def save_pair(kind: str, folder: Path, plain: Path) -> tuple[Path, Path]:
    """A checkpoint in few bits, and the values that it stands for in fp32."""
    from tiny_architectures import build, small_config
    from transformers import AutoModelForCausalLM

    stored, dense = folder / f"{kind}-stored", folder / f"{kind}-dense"
    if kind == "fp8":
        shutil.copytree(plain, stored)
    else:
        config = small_config("gpt_oss")
        config.intermediate_size = 64  # scales are for 32 numbers
        build(AutoModelForCausalLM, config).save_pretrained(stored)
        save_tokenizer(stored)
    shutil.copytree(stored, dense)
    values = store_in_fp8(stored, block=24) if kind == "fp8" else store_in_mxfp4(stored)  # 24: divides no size
    save_file(
        {name: value.contiguous() for name, value in values.items()}, dense / "model.safetensors", {"format": "pt"}
    )
    return stored, dense


def load_plainly(path: Path, **settings: Any) -> Any:
    """gpt-oss has no fused attention on a CPU, and its experts are computed one by one."""
    from transformers import AutoModelForCausalLM

    slow = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(path, **settings | (slow if "mxfp4" in str(path) else {}))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_few_bits_train_as_the_values_they_stand_for(workshop: Workshop, kind: str) -> None:  # noqa: F811
    stored, dense = save_pair(kind, workshop.folder, workshop.model)
    common = ["data.packing=false", STILL]
    config = workshop.composed("reference", f"model.path={dense}", *common).config
    expected = train_plainly(config, workshop.folder / "cache", SimpleNamespace(from_pretrained=load_plainly))
    names = {stage: f"{kind}-{stage}" for stage in (0, 2, 3)}
    cases = [
        workshop.case(name, f"model.path={stored}", f"zero=stage{stage}", *common) for stage, name in names.items()
    ]
    run_ranks(PROGRAM, 2, cases)
    for name in names.values():
        rows = workshop.rows(name)
        assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-6), name
        assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norms, rel=1e-6), name
        trained = workshop.weights(name)
        for key, weight in expected.weights.items():
            assert (trained[key] - weight).abs().max() < 5e-6, f"{name}: {key}"
        description = json.loads((workshop.folder / name / "export" / "config.json").read_text())
        assert "quantization_config" not in description
