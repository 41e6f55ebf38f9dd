"""Whole runs through the command line on real ranks: killed, interrupted, resumed, inside other launches."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from html import unescape
from pathlib import Path

import psutil
import pytest
from support.command import Commands, at_step, exact, family_of, metrics, overrides_of_run, ranks_of, result, wait_until
from support.tiny import save_decoder, write_dialogues

STEPS = 40


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("runs")
    save_decoder(folder / "model")
    write_dialogues(folder / "dialogues.jsonl", 300)
    return Commands(folder)


def overrides(name: str, *further: str) -> list[str]:
    return overrides_of_run(name, STEPS, "launch.processes=2", *further)


@pytest.fixture(scope="module")
def undisturbed(workplace) -> list[dict]:
    done = workplace.run("train", *overrides("undisturbed"))
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = workplace.folder / "undisturbed"
    assert result(run_dir)["status"] == "completed"
    assert [row["step"] for row in metrics(run_dir) if "loss" in row] == list(range(1, STEPS + 1))
    return exact(run_dir)


def test_kill_9_of_one_rank_and_resume(workplace, undisturbed):
    run_dir = workplace.folder / "killed"
    command = workplace.start("train", *overrides("killed"))
    wait_until(lambda: at_step(run_dir, 8))
    ranks = ranks_of(run_dir)
    family = family_of(command.pid)
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.kill()
    killed = time.monotonic()
    assert command.wait(timeout=60) == 1
    assert time.monotonic() - killed < 10
    assert not ranks_of(run_dir)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert "rank 1" in workplace.log
    assert "SIGKILL" in workplace.log
    ended = result(run_dir)
    assert ended["reason"] in unescape((run_dir / "report.html").read_text()), "a run that failed leaves its report too"
    assert ended["status"] == "failed"
    assert "rank 1" in ended["reason"]

    again = workplace.run("train", *overrides("killed"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert exact(run_dir) == undisturbed
    assert result(run_dir)["status"] == "completed"
    assert 'title="resumed at step' in (run_dir / "report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.ci)])
def test_signal_saves_and_the_same_command_continues(workplace, undisturbed, number):
    name = f"stopped-{number.name}"
    run_dir = workplace.folder / name
    command = workplace.start("train", *overrides(name))
    wait_until(lambda: at_step(run_dir, 7))
    command.send_signal(number)
    assert command.wait(timeout=60) == 75
    assert not ranks_of(run_dir)
    assert result(run_dir)["status"] == "preempted"
    assert result(run_dir)["reason"] == f"received {number.name}", "and not what the ranks were told with"
    assert not (run_dir / "logs" / "signal").exists()
    saved = result(run_dir)["steps"]
    assert 7 <= saved < STEPS
    assert (run_dir / "checkpoints" / f"step-{saved:08d}" / "COMMITTED").exists()
    again = workplace.run("train", name)  # by its path, with nothing else said
    assert again.returncode == 0, again.stdout + again.stderr
    assert exact(run_dir) == undisturbed


def test_a_signal_to_one_rank_only_stops_all_of_them(workplace):
    run_dir = workplace.folder / "one"
    command = workplace.start("train", *overrides("one"))
    wait_until(lambda: at_step(run_dir, 3))
    next(rank for rank in ranks_of(run_dir) if rank.environ()["RANK"] == "1").send_signal(signal.SIGUSR1)
    assert command.wait(timeout=60) == 75
    assert "SIGUSR1" in result(run_dir)["reason"]


def test_a_changed_trajectory_is_refused_on_resume(workplace, undisturbed):
    refused = workplace.run("train", *overrides("undisturbed", "optimizer.lr=5e-3"))
    assert refused.returncode == 2
    assert "optimizer.lr" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout
    # What does not change it is no obstacle, and a finished run has nothing to do.
    done = workplace.run("train", *overrides("undisturbed", "checkpoint.keep=3"))
    assert done.returncode == 0


def test_a_run_goes_on_with_another_number_of_ranks_and_another_stage(workplace, undisturbed):
    """Its curve is that of tests/parity/test_elastic.py; here through the command line, to a longer run and its export."""
    shutil.copytree(workplace.folder / "undisturbed", workplace.folder / "moved")
    more = ["launch.processes=1", "zero.stage=1", f"trainer.max_steps={STEPS + 1}"]
    moved = workplace.run("train", "moved", *more)
    assert moved.returncode == 0, moved.stdout + moved.stderr
    end = result(workplace.folder / "moved")
    assert (end["status"], end["steps"], end["world_size"]) == ("completed", STEPS + 1, 1)
    rows = [row for row in exact(workplace.folder / "moved") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 2))


def test_changed_rows_are_refused_on_resume(workplace, undisturbed):
    rows = workplace.folder / "dialogues.jsonl"
    before = rows.read_text()
    try:
        rows.write_text("".join(before.splitlines(keepends=True)[:-20]))
        refused = workplace.run("train", "undisturbed", f"trainer.max_steps={STEPS + 5}")
    finally:
        rows.write_text(before)
    assert refused.returncode == 2
    assert "data.train" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.ci
def test_stopped_at_an_evaluation_the_resumed_run_decides_as_the_undisturbed_one(workplace):
    """Evaluated at every step with a gain that no step can reach: early stopping after the third evaluation."""
    stopping = ["trainer.early_stopping.patience=2", "trainer.early_stopping.min_delta=100", "evaluate.every=1"]
    stopping += ["checkpoint.every=0", "run.export=best"]
    whole = workplace.run("train", *overrides("patience", *stopping))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    cut = workplace.run("train", *overrides("patience-cut", *stopping, "run.time_limit=0.000001"))
    assert cut.returncode == 75, cut.stdout + cut.stderr
    # Without null the run would keep its time limit.
    again = workplace.run("train", *overrides("patience-cut", *stopping, "run.time_limit=null"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert exact(workplace.folder / "patience-cut") == exact(workplace.folder / "patience")
    assert result(workplace.folder / "patience-cut")["status"] == "stopped"
    assert result(workplace.folder / "patience-cut")["steps"] == 3


@pytest.mark.ci
def test_the_best_checkpoint_is_exported_when_the_last_step_is_the_best(workplace):
    """The last step is saved and evaluated by different cadences: its checkpoint knows its own evaluation."""
    few = ["trainer.max_steps=4", "checkpoint.every=1", "evaluate.every=3", "run.export=best"]
    done = workplace.run("train", *overrides("best", *few, "optimizer.lr=1e-2"))
    assert done.returncode == 0, done.stdout + done.stderr
    ended = result(workplace.folder / "best")
    assert ended["best"]["step"] == 4
    evaluation = workplace.run("evaluate", "best", "--json")
    assert evaluation.returncode == 0, evaluation.stderr
    assert f"{ended['eval_final']['loss']:.4f}"[:5] in evaluation.stdout


def outer(workplace: Commands, name: str, program: list[str]) -> Path:
    few = ["trainer.max_steps=5", "evaluate.every=0", "checkpoint.every=0"]
    done = workplace.run("train", *overrides(name, *few), program=tuple(program))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return workplace.folder / name


@pytest.fixture(scope="module")
def five_steps(workplace) -> list[dict]:
    few = ["trainer.max_steps=5", "evaluate.every=0", "checkpoint.every=0"]
    assert workplace.run("train", *overrides("five", *few)).returncode == 0
    return exact(workplace.folder / "five")


@pytest.mark.ci
def test_inside_the_deepspeed_launcher(workplace, five_steps):
    launcher = Path(sys.executable).with_name("deepspeed")
    program = [str(launcher), "--num_gpus", "2", "--master_port", "29713", "--no_local_rank", "--module", "dstune"]
    workplace.env["PATH"] = f"{launcher.parent}:{workplace.env['PATH']}"
    workplace.env["DS_ACCELERATOR"] = "cpu"
    run_dir = outer(workplace, "deepspeed", program)
    assert exact(run_dir) == five_steps
    assert result(run_dir)["world_size"] == 2


@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="install openmpi-bin to run ranks under mpirun")
def test_inside_mpirun(workplace, five_steps):
    workplace.env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ["--bind-to", "none", "--oversubscribe", "--mca", "btl", "self,sm"]
    run_dir = outer(workplace, "mpirun", ["mpirun", "-n", "2", *options, sys.executable, "-m", "dstune"])
    assert exact(run_dir) == five_steps


@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="install openmpi-bin to run ranks under mpirun")
def test_a_mistake_inside_mpirun_is_reported_once(workplace):
    workplace.env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ["--bind-to", "none", "--oversubscribe", "--mca", "btl", "self,sm"]
    program = ("mpirun", "-n", "2", *options, sys.executable, "-m", "dstune")
    done = workplace.run("train", *overrides("mistake", "trainer.micro_batch_size=0"), program=program)
    assert done.returncode == 2
    assert done.stderr.count("trainer.micro_batch_size=0") == 1


def test_non_finite_loss_is_skipped_then_fails(workplace):
    broken = ["optimizer=sgd", "optimizer.lr=1e30", "trainer.grad_clip=0", "trainer.max_nonfinite_steps=2"]
    done = workplace.run("train", *overrides("broken", *broken, "schedule=constant", "evaluate.every=0"))
    assert done.returncode == 1
    ended = result(workplace.folder / "broken")
    assert ended["status"] == "failed"
    assert "not finite" in ended["reason"]
    assert ended["nonfinite_steps"] == 3
    skipped = [row for row in metrics(workplace.folder / "broken") if row.get("skipped") == "nonfinite"]
    assert len(skipped) == 3
