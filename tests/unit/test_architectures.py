"""The table of architectures: docs/architectures.md is made of it, and nothing in it was trained wrongly."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def test_packed_rows_longer_than_what_attention_chooses_are_refused() -> None:
    from dstune.trainer.sanity_checks import chosen_tokens_problem

    sparse = SimpleNamespace(model_type="deepseek_v32", index_topk=2048)
    problem = chosen_tokens_problem(sparse, 4096)
    assert problem is not None and (problem.where, problem.value) == ("data.packing", "true")
    assert chosen_tokens_problem(sparse, 2048) is None
    assert chosen_tokens_problem(SimpleNamespace(model_type="llama"), 4096) is None


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
