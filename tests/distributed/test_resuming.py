"""Ranks that resume read what they need, and hash it meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.tiny import save_decoder, write_dialogues

from dstune.checkpoint import store
from dstune.config.compose import compose
from dstune.config.run_file import write_run

RANK = Path(__file__).parents[2] / "benchmarks" / "resuming.py"

pytestmark = pytest.mark.ci


@pytest.mark.parametrize("stage", [2, 3])
def test_each_rank_reads_its_own_shards_once_and_of_another_layout_only_its_part(tmp_path, monkeypatch, stage):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    model = save_decoder(tmp_path / "model", hidden_size=256, intermediate_size=1024)
    data = write_dialogues(tmp_path / "dialogues.jsonl", 20)
    run = tmp_path / "run"
    run.mkdir()
    words = [f"model.path={model}", f"data.train={data}", f"zero=stage{stage}", f"run.dir={run}"]
    write_run(run / "run.yaml", compose([*words, "trainer.precision=bf16"]))
    run_ranks(RANK, 2, ["save", str(run / "run.yaml")])
    checkpoint = store.newest(run)
    assert checkpoint is not None
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    whole = sum(sizes.values())

    def resume(ranks: int) -> list[dict[str, float]]:
        outputs = run_ranks(RANK, ranks, ["resume", str(run / "run.yaml")])
        return [json.loads(output.splitlines()[-1]) for output in outputs]

    for rank, figures in enumerate(resume(2)):
        mine = sum(
            size for name, size in sizes.items() if f"pp_rank_{rank}_" in name or name.startswith("mp_rank_00_model")
        )
        assert mine <= figures["read"] < 1.05 * mine + 200_000
    optimizer = sum(size for name, size in sizes.items() if name.endswith("_optim_states.pt"))
    four = resume(4)
    assert sum(figures["read"] for figures in four) < 1.05 * whole + 800_000  # hashed once by all together
    assert max(figures["mapped"] for figures in four) < 0.5 * optimizer  # a quarter, in whole pages
