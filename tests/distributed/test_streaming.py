"""Mixtures and streams on two ranks: killed at two places and continued, they are what an undisturbed run is."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command import Commands, exact, metrics, ranks_of, result, wait_until
from support.tiny import save_decoder, write_dialogues

from dstune.checkpoint.shards import Weights

STEPS = 44
STREAM_ROWS = 50
SHARDS = 3
SHARD_ROWS = 80


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("streams")
    save_decoder(folder / "model")
    for number in range(SHARDS):
        write_dialogues(folder / f"shard-{number}.jsonl", SHARD_ROWS, seed=number)
    write_dialogues(folder / "few.jsonl", 30, seed=7)
    return Commands(folder)


def overrides(name: str, *further: str) -> list[str]:
    return [
        "model.path=model",
        "data.max_length=64",
        "optimizer.lr=1e-3",
        "zero=stage2",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=6",
        f"trainer.max_steps={STEPS}",
        "checkpoint.every=4",
        "checkpoint.keep=1",
        "evaluate.every=20",
        "run.export=none",
        "launch.processes=2",
        f"run.dir={name}",
        *further,
    ]


STREAM = ("data.train='shard-*.jsonl'", "data.streaming=true", f"data.stream_rows={STREAM_ROWS}", "data.packing=false")
MIXTURE = ("data.mixture={many:{path:'shard-*.jsonl',weight:0.3,max_rows:100},few:{path:few.jsonl,weight:1.5}}",)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return dict(Weights(run_dir / "checkpoints" / f"step-{STEPS:08d}"))


def kill_at(workplace: Commands, run_dir: Path, step: int, arguments: list[str]) -> None:
    command = workplace.start("train", *arguments)
    wait_until(lambda: (rows := metrics(run_dir)) and rows[-1]["step"] >= step)
    next(rank for rank in ranks_of(run_dir) if rank.environ()["RANK"] == "1").kill()
    assert command.wait(timeout=60) == 1
    assert not ranks_of(run_dir)


@pytest.mark.parametrize("data", [STREAM, MIXTURE], ids=["stream", "mixture"])
def test_killed_twice_and_continued_is_the_undisturbed_run(workplace, data, request):
    kind = request.node.callspec.id
    whole, killed = workplace.folder / f"{kind}-whole", workplace.folder / f"{kind}-killed"
    done = workplace.run("train", *overrides(whole.name, *data))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in metrics(whole) if "loss" in row] == list(range(1, STEPS + 1))

    for step in (10, 31):  # in the middle of blocks of 7 or 8 steps: of the first pass and of the second one
        kill_at(workplace, killed, step, overrides(killed.name, *data))
    again = workplace.run("train", *overrides(killed.name, *data))
    assert again.returncode == 0, again.stdout + again.stderr
    assert exact(killed) == exact(whole)
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_stream_goes_on_without_its_cache_and_on_one_rank(workplace):
    """The position in the checkpoint is enough: the blocks prepared before are gone."""
