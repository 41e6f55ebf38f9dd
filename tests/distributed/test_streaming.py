"""Mixtures and streams on two ranks: killed at two places and continued, they are what an undisturbed run is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.command import Commands, exact, metrics, ranks_of, wait_until
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
    """The position in the checkpoint is enough: all that was prepared is gone, and the ranks are others."""
    whole, moved = workplace.folder / "stream-whole", workplace.folder / "stream-moved"
    if not whole.exists():
        assert workplace.run("train", *overrides(whole.name, *STREAM)).returncode == 0
    kill_at(workplace, moved, 27, overrides(moved.name, *STREAM))
    shutil.rmtree(workplace.folder / "cache")
    again = workplace.run("train", *overrides(moved.name, *STREAM, "launch.processes=1"))
    assert again.returncode == 0, again.stdout + again.stderr
    expected, found = ([row for row in metrics(run) if "loss" in row] for run in (whole, moved))
    for name in ("step", "epoch", "tokens"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert not list((workplace.folder / "cache" / "stream").iterdir())  # a run that ends leaves no block


def test_changed_shards_and_bad_rows_are_named(workplace):
    folder = workplace.folder
    for number in range(2):
        write_dialogues(folder / f"part-{number}.jsonl", 60, seed=20 + number)
    data = ("data.train='part-*.jsonl'", "data.streaming=true", "data.stream_rows=30", "data.packing=false")
    few = ("trainer.max_steps=6", "launch.processes=1", "evaluate.every=0")
    assert workplace.run("train", *overrides("changed", *data, *few)).returncode == 0
    with (folder / "part-1.jsonl").open("a") as stream:
        stream.write('{"messages": []}\n')
    refused = workplace.run("train", *overrides("changed", *data, *few, "trainer.max_steps=40"))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "bring back the rows" in refused.stderr
    assert "Traceback" not in refused.stderr
    failed = workplace.run("train", *overrides("bad", *data, *few, "trainer.max_steps=40"))
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "part-1.jsonl:61" in failed.stderr
    assert "data.on_bad_row=skip" in failed.stderr
    assert "Traceback" not in failed.stderr
