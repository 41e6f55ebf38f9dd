"""The table of architectures: docs/architectures.md is made of it, and nothing in it was trained wrongly."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import architecture_page  # noqa: E402
from architecture_cases import Case, read_state  # noqa: E402

TABLE = json.loads(architecture_page.TABLE.read_text())


def test_the_page_is_made_of_the_table() -> None:
    assert architecture_page.page(TABLE) == architecture_page.PAGE.read_text()


def test_nothing_is_trained_wrongly_without_a_word() -> None:
    assert [entry["case"] for entry in TABLE["cases"] if entry["status"] == "wrong"] == []
    assert sum(entry["status"] == "equal" for entry in TABLE["cases"]) > 20


def test_samples_that_a_long_row_would_change_are_refused() -> None:
    from transformers import Llama4TextConfig, Phi3Config

    from dstune.config.compose import compose
    from dstune.models.row_length import row_length_problem

    def refused(architecture: Any, length: int, *words: str) -> tuple[str, str] | None:
        config = compose(["model=smollm2", "data=chitchat", f"data.max_length={length}", *words]).config
        problem = row_length_problem(config, architecture)
        return None if problem is None else (problem.where, problem.fix)

    padded, alone = "data.packing=false", ["data.packing=false", "trainer.micro_batch_size=1"]
    sparse = SimpleNamespace(model_type="deepseek_v32", index_topk=2048)
    assert refused(sparse, 4096) == ("data.packing", "data.packing=false, or data.max_length=2048")
    assert refused(sparse, 2048) is None and refused(sparse, 4096, padded) is None
    chunked = Llama4TextConfig()  # chunks of 8,192 tokens; some layers scale their scores from token 8,192 on
    assert refused(chunked, 16384) == ("data.packing", "data.packing=false, or data.max_length=8191")
    assert refused(chunked, 8191) is None and refused(chunked, 16384, padded) is None
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, **factors}
    phi = Phi3Config(max_position_embeddings=131072, rope_parameters=longrope)
    fix = "data.max_length=4096, or data.packing=false trainer.micro_batch_size=1"
    assert refused(phi, 8192) == refused(phi, 8192, padded) == ("data.max_length", fix)
    assert refused(phi, 4096) is None and refused(phi, 8192, *alone) is None
    several = refused(phi, 8192, *alone, "evaluate.micro_batch_size=2")
    assert several == ("data.max_length", f"{fix} evaluate.micro_batch_size=1")
    pairs = ["task=preference", "data.packing=false"]
    assert refused(phi, 8192, *alone, *pairs) == ("data.max_length", "data.max_length=4096")
    assert refused(SimpleNamespace(model_type="llama"), 4096) is None


def made_again(folder: Path, *options: str) -> list[str]:
    """Cases that do not end as the table says, or wrongly."""
    state = folder / "state.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "architectures.py"), "run", str(state), *options]
    subprocess.run(command, check=True, timeout=7200, cwd=ROOT)
    expected = {Case(**entry["case"]).name: entry["status"] for entry in TABLE["cases"]}
    found = {name: entry["status"] for name, entry in read_state(state).items()}
    assert found
    return [
        f"{name}: {status}"
        for name, status in found.items()
        if status == "wrong" or status != expected.get(name, status)
    ]


TWENTY = (
    "causal:llama,causal:gemma2,causal:gemma3,causal:gemma4_text,causal:glm4,causal:glm4_moe,causal:gpt2,causal:gpt_neox,"
    "causal:gpt_oss,causal:granite,causal:lfm2,causal:deepseek_v3,causal:cohere2,causal:exaone4,causal:ernie4_5,causal:falcon,"
    "causal:jamba,causal:bloom,classification:bert,seq2seq:bart"
)


@pytest.mark.ci
def test_twenty_architectures_end_as_the_table_says(tmp_path: Path) -> None:
    assert made_again(tmp_path, "--kinds", TWENTY) == []


@pytest.mark.slow
def test_an_eighth_ends_as_the_table_says(tmp_path: Path) -> None:
    """Another eighth each day."""
    part = datetime.datetime.now(datetime.UTC).toordinal() % 8 + 1
    assert made_again(tmp_path, "--part", f"{part}/8") == []
