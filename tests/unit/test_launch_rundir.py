"""Which directory a run gets, and what is refused before anything is written."""

import errno
import json
import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from dstune.checkpoint import store
from dstune.config import schema
from dstune.config.run_file import Composed, read_run
from dstune.core.errors import UserError
from dstune.launch import records, rundir
from dstune.optim.adamw import AdamWConfig
from tests.support.configs import run_config

NOW = datetime(2026, 3, 4, 5, 6, 7)


def composed(*, overrides=(), max_steps=None, lr=None, **run):
    """What the command line says, and 10 steps at 2e-5 where it does not."""
    given = [f"{key}={value}" for key, value in (("trainer.max_steps", max_steps), ("optimizer.lr", lr)) if value]
    return Composed(
        run_config(
            run=schema.RunSection(**run),
            trainer=schema.TrainerConfig(max_steps=max_steps or 10),
            optimizer=AdamWConfig(lr=lr or 2e-5),
        ),
        [*given, *overrides],
    )


def begin(path, **arguments):
    """A run at `path` as a first launch leaves it."""
    prepared = rundir.prepare(rundir.choose(composed(dir=str(path), **arguments)))
    assert prepared.continues is None
    release(prepared)
    return path


def release(prepared):
    if prepared.lock is not None:
        os.close(prepared.lock)


def save(path, step, *, incomplete=False):
    folder = path / "checkpoints" / f"{store.tag(step)}.incomplete"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("12345")
    final = store.commit(folder, {"step": step})
    if incomplete:
        (final / "weights").write_text("1")
    return final


def chosen(*arguments, **keywords):
    return rundir.choose(*arguments, **keywords, now=NOW).config.run


def test_a_new_run_gets_a_directory_of_its_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert chosen(composed(name="mine")).dir == "runs/mine/2026-03-04_05-06-07"
    Path("runs/mine/2026-03-04_05-06-07").mkdir(parents=True)
    assert chosen(composed(name="mine")).dir == "runs/mine/2026-03-04_05-06-07-2"
    assert [path.name for path in Path("runs/mine").iterdir()] == ["2026-03-04_05-06-07"]


def test_a_started_run_is_written_and_continued_from_its_newest_whole_checkpoint(tmp_path):
    run = begin(tmp_path / "run")
    assert read_run(run / "run.yaml").config.run.dir == str(run)
    again = rundir.prepare(rundir.choose(composed(dir=str(run))))
    assert again.continues is None  # it had not saved
    release(again)
    first = save(run, 4)
    save(run, 8, incomplete=True)
    longer = rundir.prepare(rundir.choose(composed(dir=str(run), max_steps=20)))
    assert (longer.continues, longer.nothing_to_do) == (first, False)
    assert read_run(run / "run.yaml").config.trainer.max_steps == 20
    release(longer)


def test_never_refuses_a_run(tmp_path):
    run = begin(tmp_path / "run")
    rundir.choose(composed(dir=str(run), resume="never"))  # nothing was trained there yet
    (run / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"run.resume=never: .* contains a run already"):
        rundir.choose(composed(dir=str(run), resume="never"))


def test_the_named_run_is_continued_whatever_its_first_start_said(tmp_path):
    run = begin(tmp_path / "run", resume="never")
    (run / "metrics.jsonl").touch()
    stored = read_run(run / "run.yaml")
    assert rundir.choose(stored, run).config.run.dir == str(run)


def test_never_counts_when_it_is_given_now(tmp_path):
    run = begin(tmp_path / "run")
    (run / "metrics.jsonl").touch()
    stored = read_run(run / "run.yaml")
    now = replace(stored.config, run=replace(stored.config.run, resume="never"))
    with pytest.raises(UserError, match=r"run.resume=never: .* contains a run already"):
        rundir.choose(Composed(now, ["run.resume=never"]), run, given=["run.resume=never"])


def test_a_refused_first_start_leaves_nothing(tmp_path):
    path = tmp_path / "runs" / "mine" / "run"
    prepared = rundir.prepare(rundir.choose(composed(dir=str(path))))
    (path / "logs").mkdir()
    (path / "logs" / "rank-0.log").write_text("refused")
    release(prepared)
    assert prepared.before.restore()
    assert list(tmp_path.iterdir()) == []


def test_a_refused_first_start_leaves_the_users_own_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    prepared = rundir.prepare(rundir.choose(composed(dir=str(tmp_path / "mine" / "new" / "run"))))
    release(prepared)
    (tmp_path / "mine" / "new" / "other").mkdir()  # another run that was begun meanwhile
    assert prepared.before.restore()
    assert [path.name for path in (tmp_path / "mine" / "new").iterdir()] == ["other"]


def test_a_start_that_is_refused_early_leaves_what_another_has_begun_there_meanwhile(tmp_path):
    chosen_by_both = rundir.choose(composed(dir=str(tmp_path / "runs" / "run")))
    refused, early = rundir.before_launch(chosen_by_both), rundir.before_launch(chosen_by_both)
    prepared = rundir.prepare(chosen_by_both)
    refused.restore_unless_taken()
    assert (tmp_path / "runs" / "run" / "run.yaml").is_file()
    prepared.before.restore()
    release(prepared)
    (tmp_path / "runs" / "run" / "data").mkdir(parents=True)  # rows of a launch that holds no lock yet
    early.restore_unless_taken()
    assert not (tmp_path / "runs").exists()


def test_a_start_that_prepare_refuses_leaves_nothing(tmp_path):
    other = begin(tmp_path / "other")
    with pytest.raises(UserError, match=r"run\.resume"):
        rundir.prepare(composed(dir=str(tmp_path / "new"), resume=str(other)))
    assert not (tmp_path / "new").exists()


def test_a_refused_continuation_leaves_the_run_as_it_was(tmp_path):
    run = begin(tmp_path / "run")
    save(run, 4)
    (run / "result.json").write_text('{"status": "completed"}')
    (run / "launch.json").write_text('{"id": "first"}')
    (run / "environment.json").write_text("{}")
    (run / "logs").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    prepared = rundir.prepare(rundir.choose(composed(dir=str(run), max_steps=20)))
    records.begin(run, "second", 2)
    (run / "logs" / "rank-0.error").write_text("{}")
    records.write_result(run, "failed", "refused", 2)
    release(prepared)
    assert prepared.before.restore()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_training_that_began_is_not_undone(tmp_path):
    for name, continued in (("new", False), ("old", True)):
        run = tmp_path / name
        if continued:
            begin(run)
            (run / "environment.json").write_text("{}")
            os.utime(run / "environment.json", ns=(1, 1))
        prepared = rundir.prepare(rundir.choose(composed(dir=str(run), max_steps=20)))
        (run / "environment.json").write_text("{}")  # as a rank does once nothing can be refused any more
        release(prepared)
        assert not prepared.before.restore()
        assert read_run(run / "run.yaml").config.trainer.max_steps == 20


def test_a_first_stage_that_was_trained_is_not_undone(tmp_path):
    run = tmp_path / "run"
    prepared = rundir.prepare(rundir.choose(composed(dir=str(run))))
    (run / "language_model").mkdir()
    (run / "language_model" / "environment.json").write_text("{}")
    release(prepared)
    assert not prepared.before.restore()
    assert (run / "language_model").is_dir()


def test_keys_that_change_the_trajectory_are_refused(tmp_path):
    run = begin(tmp_path / "run")
    mended = rundir.prepare(rundir.choose(composed(dir=str(run), lr=2.0)))  # it had saved nothing
    assert read_run(run / "run.yaml").config.optimizer.lr == 2.0
    release(mended)
    release(rundir.prepare(rundir.choose(composed(dir=str(run)))))
    save(run, 4)
    with pytest.raises(UserError, match=r"optimizer.lr=0.1: the run began with 2e-05"):
        rundir.choose(composed(dir=str(run), lr=0.1))


def test_something_else_in_the_way_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    assert chosen(composed(dir=str(tmp_path / "photos"))).dir == str(tmp_path / "photos")  # empty
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="this folder is not empty and contains no run"):
        rundir.choose(composed(dir=str(tmp_path / "photos")))
    with pytest.raises(UserError, match="this is a file"):
        rundir.choose(composed(dir=str(tmp_path / "photos" / "cat.jpg")))
    with pytest.raises(UserError, match=r"run.dir=.*cannot be created"):
        rundir.prepare(rundir.choose(composed(dir=str(tmp_path / "photos" / "cat.jpg" / "run"))))


def test_a_start_that_was_cut_short_is_no_obstacle(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert chosen(composed(dir=str(tmp_path / "run"))).dir == str(tmp_path / "run")


def test_starting_from_another_run(tmp_path):
    other = begin(tmp_path / "other")
    for missing, reason in ((tmp_path / "nothing", "no such run directory"), (other, "no complete checkpoint")):
        with pytest.raises(UserError, match=reason):
            rundir.choose(composed(resume=str(missing), dir=str(tmp_path / "new")))
    checkpoint = save(other, 4)
    with pytest.raises(UserError, match=rf"this is a checkpoint, not a run\n    fix: run.resume={other}$"):
        rundir.choose(composed(resume=str(checkpoint), dir=str(tmp_path / "new")))
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        rundir.choose(composed(resume=str(other), dir=str(tmp_path / "new"), lr=0.1))
    fork = rundir.prepare(rundir.choose(composed(resume=str(other), dir=str(tmp_path / "new"))))
    assert fork.continues == checkpoint
    release(fork)
    # The same command, and `auto`, go on with the fork itself; until it has saved, from the other run.
    for resume in (str(other), "auto"):
        again = rundir.prepare(rundir.choose(composed(resume=resume, dir=str(tmp_path / "new"))))
        assert again.continues == checkpoint
        release(again)
    own = save(tmp_path / "new", 6)
    again = rundir.prepare(rundir.choose(composed(resume=str(other), dir=str(tmp_path / "new"))))
    assert again.continues == own
    release(again)
    with pytest.raises(UserError, match="did not begin from there"):
        rundir.choose(composed(resume=str(tmp_path / "new"), dir=str(other)))


@pytest.mark.parametrize(
    ("status", "max_steps", "done"),
    [("completed", 10, True), ("stopped", 10, True), ("completed", 11, False), ("failed", 10, False)],
)
def test_a_completed_run_has_nothing_more_to_do(tmp_path, status, max_steps, done):
    run = begin(tmp_path / "run")
    (run / "result.json").write_text(json.dumps({"status": status}))
    prepared = rundir.prepare(rundir.choose(composed(dir=str(run), max_steps=max_steps)))
    assert prepared.nothing_to_do is done
    assert (prepared.lock is None) is done
    release(prepared)


def test_a_directory_in_use_is_refused(tmp_path):
    mine = rundir.prepare(rundir.choose(composed(dir=str(tmp_path / "run"))))
    with pytest.raises(UserError, match="is running here"):
        rundir.prepare(rundir.choose(composed(dir=str(tmp_path / "run"))))
    release(mine)
    release(rundir.prepare(rundir.choose(composed(dir=str(tmp_path / "run")))))


def test_what_the_first_start_froze_is_kept(tmp_path):
    first = composed(dir=str(tmp_path / "run"))
    frozen = replace(first.config, model=replace(first.config.model, revision="a" * 40))
    release(rundir.prepare(Composed(frozen, [])))
    save(tmp_path / "run", 4)
    assert rundir.choose(first).config.model.revision == "a" * 40


def test_a_path_that_is_no_run_names_one_that_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin(Path("runs/a/one"))
    for wrong in ("runs", "runs/a", "runs/a/two", "runs/b"):
        with pytest.raises(UserError, match="runs/a/one"):
            rundir.run_directory(Path(wrong))
    assert rundir.run_directory(Path("runs/a/one")) == Path("runs/a/one")


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "free space"), (errno.EROFS, "a folder that you may write to")]
)
def test_a_directory_that_cannot_be_written_to_is_refused_with_what_helps(tmp_path, monkeypatch, number, fix):
    def refuse(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(records, "acquire_lock", refuse)
    with pytest.raises(UserError) as caught:
        rundir.prepare(rundir.choose(composed(dir=str(tmp_path / "run"))))
    (problem,) = caught.value.problems
    assert os.strerror(number) in problem.reason and fix in problem.fix
