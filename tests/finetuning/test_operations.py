"""What an operator of the fine-tuning API meets: `models.yaml`, devices, plans, trainings without a process, separate processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstune.core.errors import UserError
from dstune.finetuning import gateway_routes, service
from dstune.finetuning.blobs import RemoteBlobs
from dstune.finetuning.jobs import build, check, configuration, hyperparameters, planner
from dstune.finetuning.jobs.device_queue import Machine
from dstune.finetuning.jobs.folder import NOW, SAVE, JobFolder
from dstune.finetuning.jobs.launcher import ProcessLauncher, stop_orphan
from dstune.finetuning.jobs.planner import Estimate, Planner
from dstune.finetuning.jobs.preset_file import PresetFile
from dstune.finetuning.jobs.presets import Preset, Presets, QueueSettings, read
from dstune.finetuning.jobs.states import Change, State
from dstune.finetuning.jobs.tables import TunedModel
from dstune.finetuning.models.service import Models
from dstune.serve import keys_command, options
from dstune.serve.store.tables import DEFAULT_PROJECT
from dstune.sweep import devices
from tests.support.command import wait_until
from tests.support.jobs import Bench


def parsed(*words: str):
    return options.parsed(list(words))


# -- models.yaml


def test_a_file_of_models_that_comes_after_the_start_is_read(tmp_path):
    path = gateway_routes.parts(parsed("--no-inference"), tmp_path).presets
    presets = PresetFile(path)
    assert presets().models == {}
    path.write_text("models: {tiny: {path: base}}\n")
    assert list(presets().models) == ["tiny"]
    path.write_text("models: 5\n")
    assert list(presets().models) == ["tiny"]
    with pytest.raises(UserError, match="--presets"):
        gateway_routes.parts(parsed("--no-inference", "--presets", str(tmp_path / "none.yaml")), tmp_path)


def test_limits_below_zero_are_refused(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text(
        "models: {a: {path: b, price: -1}}\nqueue: {key: {running: -1}, organizations: {o: {waiting: -2}}}\n"
    )
    with pytest.raises(UserError) as caught:
        read(file)
    places = [problem.where for problem in caught.value.problems]
    for place in ("models.a.price", "queue.key.running", "queue.organizations.o.waiting"):
        assert any(place in where for where in places), place


def test_a_wandb_run_has_the_name_and_id_that_the_job_tells(tmp_path):
    given = hyperparameters.resolve(dict.fromkeys(hyperparameters.SUPERVISED, "auto"), 10)
    for wandb, name in (({"project": "p", "name": "mine"}, "mine"), ({"project": "p"}, "ftjob-1")):
        plan = configuration.Plan("ftjob-1", "supervised", given, 5, wandb=wandb)
        tracking = configuration.experiment(plan, Preset("tiny", "base"), JobFolder(tmp_path))["tracking"]
        assert (tracking["wandb"]["name"], tracking["wandb"]["id"]) == (name, "ftjob-1")


# -- devices


def test_a_job_that_needs_more_devices_than_there_are_waits_and_holds_up_nobody(tmp_path):
    bench = Bench(tmp_path)
    bench.presets = Presets({"tiny": Preset("tiny", "base"), "large": Preset("large", "base", devices=3)})
    large, small = bench.add(preset="large"), bench.add()
    bench.step(3)
    assert (bench.state(large), bench.state(small)) == (State.QUEUED, State.RUNNING)
    assert (
        bench.messages(large).count("The job needs 3 devices, and this server has 2. It waits until there are more.")
        == 1
    )
    bench.presets = replace(bench.presets, queue=QueueSettings(devices=4))
    bench.step()
    assert bench.state(large) == State.RUNNING


def test_a_job_goes_on_with_another_number_of_devices(tmp_path):
    """What models.yaml says at each start; between fewest_devices and devices, what is free."""
    bench = Bench(tmp_path, devices=4)

    def offer(**tiny: Any) -> None:
        bench.presets = replace(bench.presets, models={"tiny": Preset("tiny", "base", **tiny)})

    def again(job: str) -> tuple[Any, list[int], float]:
        """Pause and resume it: the ranks, devices and price of the attempt that follows."""
        with bench.database.writing.begin() as session:
            bench.store.change(session, bench.store.lock_row(session, job), Change.PAUSE)
        bench.end(job, 75)
        bench.step()
        bench.store.request_change(DEFAULT_PROJECT, job, Change.RESUME, repeated=False, message="")
        bench.step()
        return bench.launcher.started[-1][1]["devices"], bench.read(job).taken, bench.read(job).devices

    offer(devices=2)
    job = bench.add()
    bench.step(2)
    assert (bench.read(job).taken, bench.launcher.started[-1][1]["devices"]) == ([0, 1], 2)
    offer(devices=3)
    assert again(job) == (3, [0, 1, 2], 3)
    assert bench.messages(job)[-1] == "Fine-tuning job continues after step 0 on 3 device(s), not on 2"
    offer(devices=4, fewest_devices=1)
    other = bench.add(state=State.QUEUED, attempt=1)
    bench.step()
    assert bench.read(other).taken == [3], "what is free"
    assert again(job) == (3, [0, 1, 2], 3)
    bench.presets = replace(bench.presets, models={})
    assert again(job) == (3, [0, 1, 2], 3), "a job whose model is not offered any more has what it had"
    offer(devices=4)
    again(other)
    assert bench.state(other) == State.QUEUED, "all four are not free"


def test_a_job_in_the_queue_of_a_cluster_goes_on_where_its_preset_says_then(tmp_path):
    bench = Bench(tmp_path)

    def start(**launch: Any) -> dict[str, Any]:
        preset = Preset("tiny", "base", launch={"name": "slurm", **launch}, settings={"zero": {"stage": 2}})
        bench.presets = replace(bench.presets, models={"tiny": preset})
        bench.step(2)
        file = bench.of(job).configuration / "experiment" / "job.yaml"
        return json.loads(file.read_text().partition("\n")[2])

    job = bench.add()
    first = start(gpus=4)
    assert (first["launch"], bench.read(job).pool) == ({"gpus": 4, "wait": False}, "slurm")
    assert "devices" not in bench.launcher.started[-1][1]
    bench.end(job, 75)
    assert start(gpus=2, nodes=2) == first | {"launch": {"gpus": 2, "nodes": 2, "wait": False}}


def test_a_gpu_is_not_given_to_two_jobs(monkeypatch):
    machine = Machine(2, ["0", "1"])
    assert [machine.capacity(requested) for requested in (None, 1, 5)] == [2, 1, 2]
    assert Machine(1).capacity(4) == 4  # processors are shared
    monkeypatch.setattr(devices, "here", lambda: devices.Devices(("0", "1"), (0,)))
    assert build.this_machine(Presets()).devices == 2
    with pytest.raises(UserError, match="2 GPUs"):
        build.this_machine(Presets(queue=QueueSettings(devices=3)))


# -- plans


def plan_of(made: Planner, preset: Preset, method: str) -> Estimate:
    while (plan := made.ask(preset, method)) is None:
        time.sleep(0.01)
    return plan


def test_a_plan_is_made_anew_when_its_preset_changes_or_planning_failed(tmp_path, monkeypatch):
    made = Planner(tmp_path)
    asked: list[str] = []
    answer = Estimate(fits=False, reason="too large")
    monkeypatch.setattr(made, "_estimate", lambda preset, method: asked.append(method) or answer)
    small, large = Preset("a", "base", max_length=512), Preset("a", "base", max_length=4096)
    for preset in (large, large, small, small):
        assert plan_of(made, preset, "dpo") == answer
    assert len(asked) == 2
    answer = Estimate(fits=False, reason="model.path: the hub does not answer", planned=False)
    for _ in range(2):
        plan_of(made, small, "supervised")
    assert len(asked) == 3
    monkeypatch.setattr(planner, "AGAIN_SECONDS", 0.0)
    assert made.ask(small, "supervised") is None
    while len(asked) < 4:
        time.sleep(0.01)
    assert not planner.read(1, "Traceback").planned


def test_a_plan_is_of_the_fewest_devices_that_are_enough(tmp_path, monkeypatch):
    planned = []

    def run(command, **options):
        (file,) = Path(command[command.index("--config-dir") + 1]).glob("experiment/*.yaml")
        planned.append(json.loads(file.read_text().partition("\n")[2])["launch"]["processes"])
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(planner.subprocess, "run", run)
    plan_of(Planner(tmp_path), Preset("a", "base", devices=4, fewest_devices=2), "supervised")
    assert planned == [2]


def test_a_plan_is_of_the_machine_that_jobs_run_on(tmp_path, monkeypatch):
    asked: list[list[str]] = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(planner.subprocess, "run", run)
    cluster = Preset("a", "base", launch={"name": "slurm", "partition": "gpu"})
    assert Planner(tmp_path).ask(cluster, "supervised") == Estimate(fits=True)
    assert Planner(tmp_path, here=False).ask(Preset("a", "base"), "supervised") == Estimate(fits=True)
    assert asked == []
    plan_of(Planner(tmp_path), replace(cluster, hardware="4xH100-80G"), "supervised")
    assert asked[0][-1] == "hardware=4xH100-80G"
    file = tmp_path / "models.yaml"
    file.write_text("models: {a: {path: b, hardware: 4xNothing}}\n")
    with pytest.raises(UserError, match=r"models\.a\.hardware"):
        read(file)


# -- processes

TRAINING = """
import os, signal, sys, time
from pathlib import Path
from dstune.launch import records
run = Path(sys.argv[1])
lock = records.acquire_lock(run)
signal.signal(signal.SIGTERM, lambda *_: (run / "signals").open("a").write("x"))
records.begin(run, "launch", 1)
while True:
    time.sleep(0.05)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1] + '/run'])"


def test_a_training_that_saves_for_long_gets_no_second_signal(tmp_path):
    """A second signal would end it without saving. One whose process is gone is asked by a file, which may be written again."""
    folder = JobFolder(tmp_path)
    folder.run.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder.path), TRAINING])
    signals, stop = folder.run / "signals", folder.run / "STOP"
    child = 0
    try:
        wait_until((folder.run / "launch.json").exists)
        child = json.loads((folder.run / "launch.json").read_text())["pid"]
        for how in (SAVE, SAVE, NOW):
            stop_orphan(folder, how)
        time.sleep(0.3)
        assert (signals.exists(), stop.exists()) == (False, False)
        parent.kill()
        parent.wait()
        for _ in range(2):
            stop_orphan(folder, SAVE)
        time.sleep(0.3)
        assert (signals.exists(), stop.exists()) == (False, True)
        stop_orphan(folder, NOW)
        wait_until(signals.exists)
    finally:
        parent.kill()
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_new_prefix_counts_from_the_next_start_on(tmp_path):
    prefix: list[str] = []
    launcher = ProcessLauncher(lambda: prefix, program=["/bin/sh", "-c", "touch $0/$PLACE"])
    for place in ("plain", "prefixed"):
        folder = JobFolder(tmp_path / place)
        folder.create()
        launcher.start(folder, {}, {"PLACE": "plain"})
        wait_until((folder.path / place).exists)
        prefix[:] = ["env", "PLACE=prefixed"]


def test_the_start_of_a_continued_training_stays_when_the_model_is_deleted(tmp_path):
    bench = Bench(tmp_path)
    first = bench.add()
    model = bench.of(first).models / "step-8"
    model.mkdir(parents=True)
    (model / "adapter_config.json").write_text("{}")
    name = "ft:tiny:default::abcdefgh"
    row = bench.read(first)
    with bench.database.writing.begin() as session:
        session.add(
            TunedModel(
                id="model-1", created_at=1, name=name, organization=row.organization, project=row.project, job=first,
                preset="tiny", folder=f"{first}/models/step-8",
            )
        )  # fmt: skip
    job = bench.add(start=name)
    bench.step(2)
    for path in (model / "adapter_config.json", model):
        path.unlink() if path.is_file() else path.rmdir()
    experiment = (bench.of(job).configuration / "experiment" / "job.yaml").read_text()
    assert (bench.of(job).start / "adapter_config.json").read_text() == "{}"
    assert json.loads(experiment.partition("\n")[2])["method"]["adapter"] == str(bench.of(job).start)


def test_the_time_in_the_queue_of_a_cluster_is_not_counted(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    bench.presets = replace(bench.presets, models={"tiny": Preset("tiny", "base", devices=2)})
    job = bench.add()
    bench.step(2)
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + 3600)
    bench.end(job, 75, seconds=5.0)
    bench.reconciler.trainings.watch(bench.read(job))
    assert bench.read(job).device_seconds == 10.0


def test_separate_processes_share_the_store_of_files(tmp_path, monkeypatch):
    """`--jobs only` writes the files of results, which the API gives out."""
    made = []
    original = service.FineTuning

    class Seen(original):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)
            self.jobs.run = lambda: None

    monkeypatch.setattr(service, "FineTuning", Seen)
    monkeypatch.setattr(gateway_routes.signal, "signal", lambda *_: None)
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    words = ("--jobs", "only", "--state", str(state), "--files", f"memory://{tmp_path.name}/store")
    arguments = parsed(*words, "--max-project-bytes", "1000")
    options.check(arguments)
    codes = [service.run_instead(arguments, state) for service in arguments.services]
    assert [code for code in codes if code is not None] == [0]
    assert isinstance(made[0].blobs, RemoteBlobs)
    assert made[0].settings.project_bytes == 1000
    with pytest.raises(UserError, match="--files"):
        options.check(parsed("runs/a", "--files", "memory://x"))


def test_the_checker_looks_into_the_store_of_files(tmp_path, capsys):
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    url = f"memory://{tmp_path.name}/checked"
    database = Bench(folder).database
    api = service.FineTuning(database, folder, service.ApiSettings(store=url))
    staged = api.files.stage()
    staged.write(b"abc")
    staged.close()
    with database.writing.begin() as session:
        api.files.add(session, staged, project="proj_default", key="k", filename="a", purpose="batch")
    assert check.main([str(folder)]) == 1
    assert "its bytes are not there" in capsys.readouterr().out
    assert check.main([str(folder), "--files", url]) == 0


def test_keys_are_listed_with_their_organization(tmp_path, capsys):
    state = ["--state", str(tmp_path / "serving"), "--json"]
    keys_command.main(["add", "one", "--organization", "acme", *state])
    capsys.readouterr()
    keys_command.main(["list", *state])
    row = json.loads(capsys.readouterr().out)
    assert row["organization"].startswith("org-") and row["project"].startswith("proj_")


def test_models_go_on_being_loaded_after_a_failure(tmp_path):
    class Failing:
        loads = 0

        async def load_new(self) -> None:
            self.loads += 1
            raise OSError("the database restarts")

    async def main() -> None:
        models = Models(None, None, None)  # type: ignore[arg-type]
        models.serving = Failing()  # type: ignore[assignment]
        running = asyncio.create_task(models.loop())
        for count in (1, 2):
            while models.serving.loads < count:
                assert not running.done()
                await asyncio.sleep(0.01)
            models.notify_new_model()
        running.cancel()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_commands_to_jobs_are_committed_with_the_change_or_not_at_all(tmp_path):
    bench = Bench(tmp_path)
    job = bench.add()
    done: list[str] = []

    def request_change(change: Change) -> None:
        also = lambda session: done.append(change)  # noqa: E731
        bench.store.request_change(bench.read(job).project, job, change, repeated=False, message="m", also=also)

    for _ in range(2):
        request_change(Change.CANCEL)
    assert done == [Change.CANCEL]
