"""Mixtures and streams on two ranks: killed at two places and continued, they are what an undisturbed run is."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from support.command import Commands, exact, metrics, ranks_of, result, wait_until
from support.tiny import save_decoder, write_dialogues

from dstune.checkpoint import store
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
        "trainer.precision=fp32",  # bf16 rounds otherwise on another number of ranks
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


@pytest.mark.ci
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


@pytest.mark.ci
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


def preparing(run_dir: Path) -> psutil.Process:
    """The process that prepares the blocks of the run."""
    children = [child for rank in ranks_of(run_dir) for child in rank.children()]
    return next(child for child in children if "dstune.data.block_process" in child.cmdline())


@pytest.mark.ci
def test_a_wait_for_rows_is_no_hang_and_can_be_preempted(workplace):
    slow = workplace.folder / "stream-slow"
    arguments = overrides(slow.name, *STREAM, "trainer.stall_seconds=2", "checkpoint.every=0")
    command = workplace.start("train", *arguments)
    wait_until(lambda: (rows := metrics(slow)) and rows[-1]["step"] >= 2)
    preparing(slow).send_signal(signal.SIGSTOP)  # as if its rows took for ever
    last, since = 0, time.monotonic()
    while time.monotonic() - since < 6:
        step = metrics(slow)[-1]["step"]
        last, since = (step, time.monotonic()) if step > last else (last, since)
        time.sleep(0.1)
    assert last < STEPS
    assert command.poll() is None  # three times trainer.stall_seconds
    (slow / "SAVE").touch()
    wait_until(lambda: store.newest(slow) is not None)
    assert store.newest(slow).name == store.tag(last)
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=60) == 75, workplace.log
    assert result(slow)["status"] == "preempted"
    assert result(slow)["steps"] == last
    assert store.newest(slow).name == store.tag(last)
    assert not ranks_of(slow)


def test_files_that_change_while_it_trains_end_a_run_with_exit_code_2(workplace):
    for number in range(2):
        write_dialogues(workplace.folder / f"grows-{number}.jsonl", 60, seed=20 + number)
    data = ("data.train='grows-*.jsonl'", "data.streaming=true", "data.stream_rows=30", "data.packing=false")
    command = workplace.start("train", *overrides("grows", *data, "evaluate.every=0"))
    wait_until(lambda: metrics(workplace.folder / "grows"))
    write_dialogues(workplace.folder / "grows-2.jsonl", 60, seed=22)
    assert command.wait(timeout=60) == 2, workplace.log
    assert "changed while the run trains (new: grows-2.jsonl)" in workplace.log
    assert "Traceback" not in workplace.log


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
