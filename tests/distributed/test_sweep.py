"""Sweeps through the command line with trials that really train."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from support.command import Commands, exact, metrics, ranks_of, result, wait_until
from support.tiny import save_decoder, write_dialogues

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two trials at a time need two cores")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("sweeps")
    save_decoder(folder / "model")
    write_dialogues(folder / "dialogues.jsonl", 200)
    (folder / "broken.jsonl").write_text('{"messages": "none"}\n')
    return Commands(folder)


def overrides(steps: int, *further: str) -> list[str]:
    return [
        "model.path=model",
        "data.max_length=64",
        "data.packing=false",
        "data.split.validation=0.1",
        "zero=stage1",
        "trainer.precision=fp32",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=4",
        f"trainer.max_steps={steps}",
        "run.export=none",
        "launch.processes=1",
        *further,
    ]


def test_trials_side_by_side_one_of_which_fails(workplace: Commands):
    words = overrides(2, "data.train=dialogues.jsonl,broken.jsonl", "sweep.parallel=2", "sweep.dir=two")
    done = workplace.run("train", "--multirun", *words, "tracking.wandb.mode=offline", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    result_of_sweep = json.loads(done.stdout)
    good, bad = result_of_sweep["trials"]
    sweep = workplace.folder / "two"
    assert result_of_sweep["best"] == good
    assert (good["name"], good["status"]) == ("train=dialogues.jsonl", "completed")
    assert good["objective"]["loss"] == result(sweep / good["name"])["eval_final"]["loss"]
    assert (bad["name"], bad["status"]) == ("train=broken.jsonl", "failed")
    assert "broken.jsonl:1" in bad["reason"]
    assert "fix:" in bad["reason"]
    cores = [trial["place"].rpartition("core ")[2] for trial in result_of_sweep["trials"]]
    assert len(set(cores)) == 2
    stored = yaml.safe_load((sweep / good["name"] / "run.yaml").read_text())["config"]
    assert stored["run"]["name"] == good["name"]
    assert stored["tracking"]["group"] == "run/two"
    assert not (sweep / "train=broken.jsonl").exists(), "a start that is refused leaves no run directory"

    again = workplace.run("train", "two", "--json")
    assert again.returncode == 1, again.stdout + again.stderr
    good, bad = json.loads(again.stdout)["trials"]
    assert (good["starts"], bad["starts"]) == (1, 2), "what is finished is skipped, what failed is tried again"

    other = workplace.run("train", "-m", *words, "model.config_overrides={attention_dropout: 0.1}")
    assert other.returncode == 2
    assert "another value would change its course" in other.stderr


@pytest.mark.ci
def test_interrupted_and_continued_is_the_same(workplace: Commands):
    words = overrides(20, "data.train=dialogues.jsonl", "checkpoint.every=5")
    for rate in ("0.001", "0.002"):
        done = workplace.run("train", *words, f"optimizer.lr={rate}", f"run.dir=plain-{rate}")
        assert done.returncode == 0, done.stderr
    swept = ["train", "-m", *words, "optimizer.lr=0.001,0.002", "sweep.parallel=2"]
    command = workplace.start(*swept)

    def trials() -> list[Path]:
        return sorted(path.parent for path in workplace.folder.glob("runs/run/sweep-*/*/run.yaml"))

    wait_until(lambda: len(trials()) == 2 and all(len(metrics(path)) > 3 for path in trials()))
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=60) == 75
    assert not [rank for path in trials() for rank in ranks_of(path.absolute())]
    assert {result(path)["status"] for path in trials()} <= {"preempted", "completed"}
    assert "dstune train --multirun runs/run/sweep-" in workplace.log
    again = workplace.run(*swept)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(trials()) == 2, "the same command is the same sweep"
    for path, rate in zip(trials(), ("0.001", "0.002"), strict=True):
        assert path.name == f"lr={rate}"
        assert exact(path) == exact(workplace.folder / f"plain-{rate}")


@pytest.mark.ci
def test_trials_end_when_the_sweep_is_killed(workplace: Commands):
    words = overrides(500, "data.train=dialogues.jsonl", "optimizer.lr=0.001,0.002", "sweep.dir=killed")
    command = workplace.start("train", "-m", *words)
    path = workplace.folder / "killed" / "lr=0.001"
    wait_until(lambda: len(metrics(path)) > 2)
    assert ranks_of(path.absolute())
    command.kill()
    command.wait()
    wait_until(lambda: not ranks_of(path.absolute()), timeout=30)
    wait_until(lambda: (path / "result.json").exists(), timeout=10)
    assert result(path)["status"] == "preempted"


@pytest.mark.ci
def test_optuna_ends_a_trial_that_falls_behind(workplace: Commands):
    """The second trial does not learn: it leaves at an evaluation, says so, and frees its place for the third."""
    pytest.importorskip("optuna")
    # 90 steps of 12 ms, so that the request to end reaches the trial well before its last step.
    further = ("evaluate.every=9", "checkpoint.every=0", "sweep.dir=pruned")
    words = overrides(90, "data.train=dialogues.jsonl", "optimizer.lr=1e-2,1e-9,5e-3", *further)
    optuna = ["hydra/sweeper=optuna", "sweep.sampler=grid", "sweep.pruner=median", "sweep.startup_trials=1"]
    done = workplace.run("train", "-m", *words, *optuna, "tracking.wandb.mode=offline", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    trials = {trial["values"]["optimizer.lr"]: trial for trial in json.loads(done.stdout)["trials"]}
    assert trials[1e-2]["status"] == "completed"
    assert trials[1e-9]["status"] == "pruned"
    run_dir = workplace.folder / "pruned" / trials[1e-9]["name"]
    ended = result(run_dir)
    assert ended["status"] == "pruned"
    assert ended["steps"] < 90
    assert ended["reason"] == trials[1e-9]["reason"]
    assert "pruned (median) at step" in ended["reason"]
    assert not list((run_dir / "checkpoints").glob("step-*")), "a pruned trial is not saved"
    assert not ranks_of(run_dir.absolute())
    assert "pruned" in (workplace.folder / "pruned" / "report.html").read_text()
    listed = workplace.run("runs", "pruned", "--json")
    assert {line["status"] for line in json.loads(listed.stdout)["runs"]} >= {"completed", "pruned"}
