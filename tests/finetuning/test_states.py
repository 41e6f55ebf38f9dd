"""The states of a job: the table in the code, in the docs, and what the reconciler makes of folders."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import inspect

from dstune.finetuning.jobs.folder import JobFolder
from dstune.finetuning.jobs.presets import QueueSettings
from dstune.finetuning.jobs.states import TERMINAL, TRANSITIONS, Change, State, after
from dstune.finetuning.pages import Page
from dstune.finetuning.settings import ApiSettings
from dstune.serve.errors import ApiError
from dstune.serve.store.database import Database
from tests.support.jobs import HYPERPARAMETERS, Bench

DOCS = Path(__file__).parents[2] / "docs" / "finetuning-jobs.md"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def running(bench: Bench, **changes: object) -> str:
    job = bench.add(**changes)
    bench.step(2)
    assert bench.state(job) == State.RUNNING
    return job


def test_the_docs_have_the_table_of_the_code():
    text = DOCS.read_text(encoding="utf-8")
    found = {
        tuple(re.findall(r"`(\w+)`", line)) for line in text.splitlines() if re.match(r"\| `\w+` \| `\w+` \|", line)
    }
    assert found == {(str(state), str(change), str(to)) for (state, change), to in TRANSITIONS.items()}


def test_every_change_leads_on_or_is_refused():
    for state in State:
        for change in Change:
            if (state, change) in TRANSITIONS:
                assert after(state, change) is TRANSITIONS[state, change]
            elif (state, change) in {
                (State.CANCELLED, Change.CANCEL), (State.PAUSED, Change.PAUSE), (State.PAUSING, Change.PAUSE),
            }:  # fmt: skip
                assert after(state, change) is None
            else:
                with pytest.raises(ApiError) as caught:
                    after(state, change)
                assert (caught.value.status, caught.value.param) == (400, None)
                assert state in str(caught.value)
    for state in (State.QUEUED, State.RUNNING):
        assert after(state, Change.RESUME, repeated=True) is None
    assert not {state for state, _ in TRANSITIONS} & TERMINAL
    assert {*TRANSITIONS.values(), State.VALIDATING} == set(State)


def test_a_job_from_its_files_to_its_model(bench):
    job = bench.add(suffix="My Suffix")
    bench.step()
    assert bench.state(job) in (State.VALIDATING, State.QUEUED)
    bench.step()
    assert bench.state(job) == State.RUNNING
    assert bench.launcher.trainings() == [job]
    bench.train(job, 1, 3)
    bench.step()
    row = bench.read(job)
    assert (row.last_step, row.total_steps, row.step_seconds) == (3, 8, 0.5)
    assert row.estimated_finish is not None
    bench.train(job, 4, 8)
    bench.end(job, 0, exports=(4, 8), tokens=80)
    bench.step()
    row = bench.read(job)
    assert (row.state, row.active, row.taken, row.trained_tokens) == (State.SUCCEEDED, False, [], 80)
    assert re.fullmatch(r"ft:tiny:default:my-suffix:[A-Za-z0-9]{8}", row.fine_tuned_model)
    messages = bench.messages(job)
    assert [message for message in messages if not message.startswith("Step")] == [
        f"Created fine-tuning job: {job}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        next(
            message
            for message in messages
            if message.startswith("Checkpoint created at step 4 with Snapshot ID: ft:tiny:")
        ),
        f"New fine-tuned model created: {row.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert [message for message in messages if message.startswith("Step")] == [
        f"Step {step}/8: training loss={2 - step / 10:.2f}" for step in range(1, 9)
    ]
    checkpoints, _ = bench.store.checkpoints(row.project, job, Page(10))
    assert [(one.step, one.metrics["train_loss"]) for one in checkpoints] == [(8, 1.2), (4, 1.6)]
    assert checkpoints[0].model == row.fine_tuned_model
    assert checkpoints[1].model.endswith(":ckpt-step-4")
    with bench.database.session() as session:
        file = bench.files.of(session, row.project, row.result_file)
    assert file.purpose == "fine-tune-results"
    content = b"".join(bench.files._blobs.read(file.blob)).decode().splitlines()
    assert content[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert content[1:3] == ["1,1.9,,,", "2,1.8,,,"]
    assert len(content) == 9
    assert not bench.of(job).snapshot("training_file").exists()


def test_nothing_of_a_clients_rows_stays_when_a_job_is_over(bench):
    grader = {
        "type": "string_check",
        "name": "g",
        "operation": "eq",
        "input": "{{sample.output_text}}",
        "reference": "x",
    }
    bench.presets.models["tiny"] = replace(bench.presets.models["tiny"], methods=("reinforcement",))
    numbers = {**HYPERPARAMETERS, "compute_multiplier": 1, "eval_interval": 1, "eval_samples": 1}
    job = running(bench, method="reinforcement", grader=grader, hyperparameters=numbers)
    folder = bench.of(job)
    assert json.loads(folder.grader.read_text()) == grader
    leave_rows(folder)
    bench.store.request_change(bench.read(job).project, job, Change.CANCEL, repeated=False, message="cancelled")
    bench.kill(job)
    bench.step()
    assert [path for path in folder.client_rows if path.exists()] == []
    assert "grader" in inspect(bench.read(job)).unloaded, "only who asks for it reads it"
    leave_rows(folder)
    bench.another()._sweep()
    assert [path for path in folder.client_rows if path.exists()] == [], "of a job that was over before"


def leave_rows(folder: JobFolder) -> None:
    (folder.run / "rollouts").mkdir(parents=True)
    (folder.run / "rollouts" / "step-1.jsonl").write_text("{}\n")
    (folder.run / "samples.jsonl").write_text("{}\n")
    folder.grader.write_text("{}")


def test_bad_files_fail_the_job(bench):
    bench.launcher.validates = False
    job = bench.add()
    bench.step()
    error = {"code": "invalid_n_examples", "message": "Training file has 7 example(s)", "param": "training_file"}
    bench.of(job).validated.write_text(json.dumps({"error": error}))
    bench.kill(job)
    bench.step()
    row = bench.read(job)
    assert (row.state, row.error, row.fine_tuned_model) == (State.FAILED, error, None)
    assert row.finished_at is not None


def test_files_that_take_too_long_to_read_fail_the_job(bench):
    """And the next validation has their place."""
    bench.launcher.validates = False
    bench.presets = replace(bench.presets, queue=QueueSettings(validation_seconds=60.0))
    first, second, third = [bench.add() for _ in range(3)]
    bench.step(2)
    assert [job for job, _ in bench.launcher.started] == [first, second], "two at a time"
    os.utime(bench.of(first).task, (time.time() - 61,) * 2)
    bench.step()
    row = bench.read(first)
    assert (row.state, row.error["code"], row.error["param"]) == (State.FAILED, "validation_timeout", "training_file")
    assert bench.of(first).stop_requested() == "now"
    assert [job for job, _ in bench.launcher.started] == [first, second, third]
    assert bench.state(second) == State.VALIDATING


def test_a_training_that_its_launcher_started_again_is_told_once(bench):
    job = running(bench)

    def reach(step: int) -> list[str]:
        (bench.of(job).run / "metrics.jsonl").unlink(missing_ok=True)
        bench.train(job, 1, step)
        bench.step(2)
        return [message for message in bench.messages(job) if "goes on" in message]

    assert reach(6) == []
    told = "The training goes on from its checkpoint of step 4; it had reached step 6"
    assert reach(4) == reach(5) == reach(7) == [told]
    assert reach(6) == [told, told.replace("step 6", "step 7").replace("step 4", "step 6")]


def test_a_pause_waits_for_the_save_and_a_resume_goes_on(bench):
    job = running(bench)
    bench.train(job, 1, 5)
    project = bench.read(job).project
    row = bench.store.request_change(project, job, Change.PAUSE, repeated=False, message="pause")
    assert row.state == State.PAUSING
    bench.step()
    assert bench.of(job).stop_requested() == "save"
    assert bench.state(job) == State.PAUSING
    bench.end(job, 75, exports=(4, 5))
    bench.step()
    row = bench.read(job)
    assert (row.state, row.active, row.taken, row.last_step) == (State.PAUSED, False, [], 5)
    assert [one.step for one in bench.store.checkpoints(project, job, Page(10))[0]] == [5, 4]
    bench.step()
    assert bench.state(job) == State.PAUSED  # and stays
    assert (
        bench.store.request_change(project, job, Change.RESUME, repeated=False, message="resume").state == State.QUEUED
    )
    bench.step()
    row = bench.read(job)
    assert (row.state, row.attempt) == (State.RUNNING, 2)
    assert bench.of(job).stop_requested() == ""
    # The steps behind the checkpoint come again, and are told once.
    file = bench.of(job).run / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    bench.step()
    bench.train(job, 5, 8)
    bench.end(job, 0, exports=(4, 5, 8), tokens=80)
    bench.step()
    assert bench.state(job) == State.SUCCEEDED
    assert sum(message.startswith("Step 5/") for message in bench.messages(job)) == 1


def test_cancelling_ends_the_process_and_frees_its_devices_afterwards(bench):
    jobs = [bench.add() for _ in range(3)]
    bench.step(3)
    assert [bench.state(job) for job in jobs] == [State.RUNNING, State.RUNNING, State.QUEUED]
    project = bench.read(jobs[0]).project
    assert (
        bench.store.request_change(project, jobs[0], Change.CANCEL, repeated=False, message="cancel").state
        == State.CANCELLED
    )
    bench.step(2)
    assert bench.of(jobs[0]).stop_requested() == "now"
    assert bench.state(jobs[2]) == State.QUEUED  # its device is still taken
    bench.kill(jobs[0])
    bench.step(2)
    assert bench.state(jobs[2]) == State.RUNNING
    again = bench.store.request_change(project, jobs[0], Change.CANCEL, repeated=False, message="cancel")
    assert again.state == State.CANCELLED
    assert bench.messages(jobs[0]).count("cancel") == 1
    with pytest.raises(ApiError):
        bench.store.request_change(project, jobs[0], Change.PAUSE, repeated=False, message="pause")


@pytest.mark.parametrize("code", [75, -9, 143])
def test_what_nobody_wished_is_no_end(bench, code):
    """Ended from outside: it goes on; a plain failure does not."""
    job = running(bench)
    bench.train(job, 1, 2)
    bench.end(job, code, reason="/secret/path broke")
    bench.step(2)
    row = bench.read(job)
    if code == 143:
        assert row.state == State.FAILED
        assert row.error["code"] == "server_error"
        assert "/secret" not in json.dumps(row.error)
        assert row.trained_tokens is None
    else:
        assert (row.state, row.attempt) == (State.RUNNING, 2)


def test_a_process_that_is_gone_is_started_again_but_not_for_ever(bench):
    job = running(bench)
    for _ in range(50):
        bench.kill(job)
        bench.step()
        if bench.state(job) == State.FAILED:
            break
    assert bench.read(job).attempt == 8
    other = running(bench)
    for step in range(1, 21):  # it comes on each time
        bench.train(other, step, step, per_epoch=20)
        bench.kill(other)
        bench.step(2)
    assert bench.state(other) == State.RUNNING


def test_another_process_takes_over_where_the_first_one_was_killed(bench):
    """At every point between two writes: the row first, then the process."""
    job = bench.add()
    bench.launcher.start = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # killed between row and process
    with pytest.raises(KeyboardInterrupt):
        bench.step()
    del bench.launcher.start
    second = bench.another()
    second.step()
    assert not second.leads  # the lease of the first one has not run out
    bench.reconciler.leave()
    second.step()
    second.step()
    assert bench.state(job) == State.RUNNING
    assert bench.launcher.trainings() == [job]
    third = bench.another()
    second.leave()
    third.step()
    assert bench.launcher.trainings() == [job]  # it lives: nobody starts it twice


def test_a_preset_or_a_model_that_is_gone_fails_the_job(bench):
    withdrawn, deleted = bench.add(preset="gone"), bench.add(start="ft:tiny:default::abcdefgh")
    bench.step(3)
    for job, words in ((withdrawn, "not offered any more"), (deleted, "was deleted")):
        row = bench.read(job)
        assert (row.state, row.error["code"], row.error["param"]) == (State.FAILED, "model_not_available", "model")
        assert words in row.error["message"]


def test_a_start_that_brings_nothing_is_not_repeated_at_once(bench):
    bench.reconciler.queue.pause_seconds = 60.0
    job = running(bench)
    bench.kill(job)
    bench.step(3)
    row = bench.read(job)
    assert (row.state, row.idle_attempts, row.attempt) == (State.QUEUED, 1, 1)
    bench.reconciler.queue.pause_seconds = 0.0
    bench.step()
    assert bench.state(job) == State.RUNNING


def test_a_bad_row_that_only_the_run_finds_is_the_clients(bench):
    job = running(bench)
    place = f"{bench.of(job).train}:7"
    bench.end(job, 2, problems=[{"where": place, "reason": f"{bench.of(job).path}: too long"}])
    bench.step()
    error = bench.read(job).error
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "line 7" in error["message"]
    assert str(bench.folder) not in error["message"]


def test_a_job_of_a_project_without_space_ends(bench):
    """Its results are refused nothing: the job would keep its devices and try for ever."""
    job = running(bench)
    bench.files._settings = ApiSettings(project_bytes=1)
    bench.train(job, 1, 8)
    bench.end(job, 0, exports=(8,), tokens=80)
    bench.step()
    row = bench.read(job)
    assert (row.state, row.active) == (State.SUCCEEDED, False)
    assert row.result_file


def test_jobs_that_would_end_with_the_server_save_first(bench):
    here, cluster = running(bench), bench.add(pool="slurm")
    bench.presets.models["far"] = replace(bench.presets.models["tiny"], name="far", launch={"name": "slurm"})
    with bench.database.writing.begin() as session:
        row = bench.store.lock_row(session, cluster)
        row.preset = "far"
    bench.step(2)
    assert bench.state(cluster) == State.RUNNING
    asked = []

    def ended(folder):
        asked.append((folder.path.name, folder.stop_requested()))
        return len(asked) > 2

    bench.launcher.is_alive = lambda folder: not ended(folder)
    bench.reconciler.save_all()
    assert asked == [(here, ""), (here, "save"), (here, "save")]


def test_a_second_launch_of_a_directory_is_no_failure(bench):
    job = running(bench)
    bench.end(job, 2, problems=[{"where": "run.dir", "reason": "process 7 is running here"}])
    bench.step(2)
    assert bench.state(job) == State.RUNNING


def test_metadata_filters_and_pages(bench):
    jobs = [bench.add(meta={"a b": "ü&=", "n": str(number)}) for number in range(25)]
    bare = bench.add()
    project = bench.read(bare).project
    rows, more = bench.store.page(project, Page(20), {"a b": "ü&="})
    assert (len(rows), more) == (20, True)
    rest, more = bench.store.page(project, Page(20, after=rows[-1].id), {"a b": "ü&="})
    assert (len(rest), more) == (5, False)
    assert [row.id for row in (*rows, *rest)] == jobs[::-1]
    assert [row.id for row in bench.store.page(project, Page(20), {"a b": "ü&=", "n": "3"})[0]] == [jobs[3]]
    assert [row.id for row in bench.store.page(project, Page(20), None, without_metadata=True)[0]] == [bare]
    assert bench.store.page("proj_other", Page(20), None)[0] == []


def test_tables_and_migrations_agree(tmp_path):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from dstune.serve.store.tables import Table

    tmp_path.chmod(0o700)
    database = Database.open_folder(tmp_path)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
