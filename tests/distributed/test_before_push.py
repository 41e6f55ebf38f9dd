"""What `make test` keeps of the ladder of exactness and of the lives of runs; `make test-ci` has all of both.

One process group trains what is compared with the plain loop or with another run, and three launches are one run's life.
"""

from __future__ import annotations

import signal
import time

import psutil
import pytest
import torch
from parity import test_heads as heads
from parity import test_ladder as ladder
from parity.reference import train_plainly
from support.command import Commands, at_step, exact, family_of, overrides_of_run, ranks_of, result, wait_until
from support.ranks import run_ranks
from support.schemas import validate_files
from support.tiny import save_decoder, write_dialogues
from support.workshop import Results

HEADS = ("tags", "weighted")
LADDER = {f"s{stage}-n2": ("unpacked", [f"zero=stage{stage}", "data.packing=false"]) for stage in (1, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def workplace(folder) -> Commands:
    save_decoder(folder / "model")
    write_dialogues(folder / "dialogues.jsonl", 300)
    (folder / "role.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}\n'
        '{"messages": [{"role": "robot", "content": "w1"}, {"role": "assistant", "content": "w2"}]}\n'
    )
    return Commands(folder)


def overrides(name: str, *further: str) -> list[str]:
    return overrides_of_run(name, 40, "launch.processes=2", *further)


@pytest.fixture(scope="module")
def shops(folder, workplace) -> tuple[ladder.Workshop, heads.Workshop]:
    for name in ("ladder", "heads"):
        (folder / name).mkdir()
    texts, labels = ladder.Workshop(folder / "ladder"), heads.Workshop(folder / "heads")
    cases = [texts.case(name, *given) for name, (_, given) in LADDER.items()]
    adamw = ["zero=stage3", "optimizer=adamw", "optimizer.lr=1e-2", "schedule=cosine", "evaluate.every=2"]
    limit = "run.time_limit=0.000001"  # over after the first step of each launch
    cases += [texts.case("whole", *adamw), texts.case("cut", *adamw, limit), texts.case("end", *adamw, directory="cut")]
    cases += [
        labels.case(head, f"{head}-s{stage}-n2", f"zero=stage{stage}") for head in HEADS for stage in heads.STAGES[2]
    ]
    paths = [f"model.path={folder / 'model'}", f"data.train={folder / 'dialogues.jsonl'}"]
    composed = ladder.compose([*overrides(str(folder / "undisturbed")), *paths])
    undisturbed = Results()
    undisturbed.folder = folder
    run_ranks(ladder.PROGRAM, 2, [*cases, undisturbed.written("undisturbed", composed)])
    return texts, labels


def test_two_ranks_equal_the_plain_loop(shops):
    texts, _ = shops
    plain = train_plainly(texts.composed("reference", "data.packing=false").config, texts.folder.parent / "cache")
    ladder.equal_the_plain_loop(texts, {"unpacked": plain}, LADDER)


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_tags_and_classes_equal_the_plain_loop(shops, head):
    _, labels = shops
    model_class, _, _, _, loss = heads.HEADS[head]
    config = labels.composed(head, "reference").config
    expected = train_plainly(config, labels.folder.parent / "cache", model_class, loss)
    heads.equals_the_plain_loop(labels, expected, head, (2,))


def test_resumed_equals_uninterrupted_to_the_bit(shops):
    texts, _ = shops
    assert ladder.exact(texts.folder / "cut") == ladder.exact(texts.folder / "whole")
    assert len(texts.rows("whole")) == 5
    left, right = texts.weights("whole"), texts.weights("cut")
    assert left.keys() == right.keys() and left
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_run_that_is_interrupted_and_killed_ends_as_an_undisturbed_one(workplace, shops):
    """Ctrl-C saves and leaves with 75, kill -9 of one rank ends all of them, and the same command goes on after both."""
    run_dir = workplace.folder / "disturbed"
    command = workplace.start("train", *overrides("disturbed"))
    wait_until(lambda: at_step(run_dir, 7))
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=60) == 75
    assert not ranks_of(run_dir)
    assert (result(run_dir)["status"], result(run_dir)["reason"]) == ("preempted", "received SIGINT")
    saved = result(run_dir)["steps"]
    assert 7 <= saved < 40
    assert (run_dir / "checkpoints" / f"step-{saved:08d}" / "COMMITTED").exists()

    command = workplace.start("train", *overrides("disturbed"))
    wait_until(lambda: at_step(run_dir, saved + 3))
    family = family_of(command.pid)
    next(rank for rank in ranks_of(run_dir) if rank.environ()["RANK"] == "1").kill()
    killed = time.monotonic()
    assert command.wait(timeout=60) == 1
    assert time.monotonic() - killed < 10
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert "SIGKILL" in workplace.log
    assert result(run_dir)["status"] == "failed" and "rank 1" in result(run_dir)["reason"]

    again = workplace.run("train", "disturbed")  # by its path, with nothing else said
    assert again.returncode == 0, again.stdout + again.stderr
    assert exact(run_dir) == exact(workplace.folder / "undisturbed")
    assert result(run_dir)["status"] == "completed"
    written = {"result", "environment", "data-report", "launch", "metrics-row", "checkpoint-state", "committed"}
    assert validate_files(run_dir) == written


def test_a_bad_row_is_named_once_and_leaves_nothing_behind(workplace):
    done = workplace.run("train", *overrides("bad", "data.train=role.jsonl"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "role.jsonl:2" in done.stderr and "robot" in done.stderr
    assert done.stderr.count("dstune: ") == 1, done.stderr
    assert not (workplace.folder / "bad").exists()
