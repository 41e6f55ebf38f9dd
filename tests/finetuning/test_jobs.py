"""What stands around a job: its request, hyperparameters, rows, presets, configuration, and whose turn it is. Of the demands on the
API: group 11 (the arithmetic of "auto") and group 13 (SLURM: an answer of `sbatch` that was lost, jobs that are preempted or gone).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dstune.core.errors import UserError
from dstune.finetuning import rows
from dstune.finetuning.jobs import configuration, hyperparameters, metrics, planner, presets, process, request
from dstune.finetuning.jobs.folder import NOW, JobFolder
from dstune.finetuning.jobs.launcher import ProcessLauncher, device_environment, environment
from dstune.finetuning.jobs.presets import Limits, Preset, QueueSettings
from dstune.finetuning.jobs.scheduler import Busy, Waiting, choose
from dstune.finetuning.models.names import new_name
from dstune.finetuning.pages import Page
from dstune.serve.errors import ApiError
from tests.support.jobs import Bench

GRADER = {
    "type": "string_check",
    "name": "g",
    "operation": "eq",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
}
ASK = {"model": "tiny", "training_file": "file-x"}
MESSAGE = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def refusal(body: dict) -> tuple[str | None, str | None]:
    with pytest.raises(ApiError) as caught:
        request.read(ASK | body)
    assert caught.value.status == 400
    return caught.value.param, caught.value.code


# -- request


def test_what_a_request_may_leave_out():
    found = request.read(
        ASK | dict.fromkeys(("hyperparameters", "seed", "suffix", "validation_file", "method", "metadata"))
    )
    assert (found.method, found.suffix, found.metadata, found.integrations) == ("supervised", None, None, [])
    assert set(found.hyperparameters.values()) == {"auto"}
    assert 0 <= found.seed <= request.MOST_SEED
    assert found.seed != request.read(ASK).seed


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"something": "else"}, "something"),
        ({"model": None}, "model"),
        ({"training_file": 3}, "training_file"),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "\ud800"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"hyperparameters": {"n_epochs": 10**400}}, "hyperparameters.n_epochs"),
        ({"seed": 1.5}, "seed"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 1.5}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"lr": 1}}, "hyperparameters.lr"),
        ({"method": {}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement.grader"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.reinforcement.grader"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": {"beta": 1}}}},
         "method.reinforcement.hyperparameters.beta"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters":
         {"reasoning_effort": "high"}}}}, "method.reinforcement.hyperparameters.reasoning_effort"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.1}}}}, "method.dpo.hyperparameters.beta"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 2}}, "hyperparameters"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a" * 65: ""}}, "metadata"),
        ({"integrations": [{"type": "other"}]}, "integrations.0.type"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations.0.wandb.project"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "${oc.env:HOME}"}}]}, "integrations.0.wandb.project"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "a\nb"}}]}, "integrations.0.wandb.project"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["{a}"]}}]}, "integrations.0.wandb.tags"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_named(body, param):
    assert refusal(body)[0] == param


def test_a_reinforcement_job_has_its_grader_and_its_numbers(tmp_path):
    options = {
        "grader": GRADER,
        "hyperparameters": {"compute_multiplier": 2, "eval_interval": 5, "reasoning_effort": "default"},
    }
    found = request.read(ASK | {"method": {"type": "reinforcement", "reinforcement": options}})
    assert (found.method, found.grader) == ("reinforcement", GRADER)
    resolved = hyperparameters.resolve(found.hyperparameters, 1000)
    assert resolved == {
        "n_epochs": 3,
        "batch_size": 2,
        "learning_rate_multiplier": 1.0,
        "compute_multiplier": 2.0,
        "eval_interval": 5,
        "eval_samples": hyperparameters.EVALUATED_ROWS,
    }
    folder = JobFolder(tmp_path)
    plan = configuration.Plan("ftjob-x", "reinforcement", resolved, seed=1, validation=True, grader=found.grader)
    preset = Preset("tiny", "base", methods=("reinforcement",), settings={"task": {"max_new_tokens": 32}})
    configuration.write(plan, preset, folder)
    for file in (folder.train, folder.validation):
        file.write_text('{"prompt": "a", "answer": "b"}\n')
    from dstune.config.validate import validate
    from dstune.launch import train

    config = train.configuration(train.parse(configuration.arguments(folder))).config
    validate(config)
    assert (config.task.name, config.task.samples, config.task.max_new_tokens) == ("reinforcement", 16, 32)
    assert (config.evaluate.every, config.evaluate.max_rows) == (5, hyperparameters.EVALUATED_ROWS)
    assert json.loads(Path(config.task.graders[0]).read_text()) == GRADER


@pytest.mark.parametrize(
    ("grader", "allows_python", "param", "code"),
    [
        ({"type": "score_model", "name": "g", "model": "m", "input": [{"role": "user", "content": "x"}]}, False,
         "grader.type", "unsupported_grader"),
        ({"type": "string_check"}, False, "grader.name", "invalid_grader"),
        ({"type": "python", "name": "g", "source": "no Python"}, False, "grader.type", "unsupported_grader"),
        ({"type": "python", "name": "g", "source": "no Python"}, True, "grader.source", "invalid_grader"),
        ({"type": "multi", "name": "g", "calculate_output": "a",
          "graders": {"a": {"type": "python", "name": "a", "source": "no Python"}}}, False,
         "grader.graders.a.type", "unsupported_grader"),
        ({**GRADER, "input": "x" * 90_000, "reference": "x" * 90_000, "name": "x" * 90_000}, True,
         "grader", "invalid_grader"),
    ],
)  # fmt: skip
def test_a_grader_that_a_job_cannot_have_is_refused(grader, allows_python, param, code):
    given = request.read(ASK | {"method": {"type": "reinforcement", "reinforcement": {"grader": grader}}})
    preset = Preset("tiny", "base", methods=("reinforcement",), python_graders=allows_python)
    with pytest.raises(ApiError) as caught:
        request.check_grader_of(given, preset)
    assert (caught.value.param, caught.value.code) == (f"method.reinforcement.{param}", code)


def test_a_python_grader_is_for_the_operator_to_allow():
    python = {"type": "python", "name": "g", "source": "def grade(sample, item): return 1"}
    given = request.read(ASK | {"method": {"type": "reinforcement", "reinforcement": {"grader": python}}})
    request.check_grader_of(given, Preset("tiny", "base", methods=("reinforcement",), python_graders=True))


def test_rows_of_a_reinforcement_job(tmp_path):
    user = {"role": "user", "content": "What is 1 + 1?"}
    wrong = [
        ({"messages": [user, {"role": "assistant", "content": "2"}]}, "messages[1].role"),
        ({"messages": [user], "prompt": "x"}, "prompt"),
        ({"answer": "2"}, "messages"),
    ]
    for row, name in wrong:
        (tmp_path / "rows").write_text(json.dumps(row) + "\n")
        assert [problem.field for problem in rows.check_file(tmp_path / "rows", "reinforcement").problems] == [name]
    good = {"messages": [user], "answer": {"value": 2}}
    (tmp_path / "rows").write_text(f"{json.dumps(good)}\n" * 10)
    assert rows.check_file(tmp_path / "rows", "reinforcement").problems == []
    rows.write_rows(tmp_path / "rows", tmp_path / "made", "reinforcement")
    assert json.loads((tmp_path / "made").read_text().splitlines()[0]) == {"prompt": [user], "answer": {"value": 2}}


def test_whole_floats_are_whole_numbers():
    found = request.read(ASK | {"hyperparameters": {"n_epochs": 2.0}, "seed": 3.0})
    assert (found.hyperparameters["n_epochs"], found.seed) == (2, 3)
    assert isinstance(found.hyperparameters["n_epochs"], int)


# -- hyperparameters


@pytest.mark.parametrize(
    ("count", "epochs", "batch"),
    [
        (10, 10, 1),
        (3, 25, 1),
        (33, 3, 1),
        (34, 3, 1),
        (8333, 3, 17),
        (8334, 2, 17),
        (30_000, 1, 60),
        (1_000_000, 1, 256),
    ],
)
def test_automatic_epochs_and_batches(count, epochs, batch):
    assert (hyperparameters.epochs(count), hyperparameters.batch_size(count)) == (epochs, batch)


def test_automatic_batches_fit_the_ranks():
    assert hyperparameters.batch_size(12, 4) == 4
    assert hyperparameters.batch_size(3, 4) == 1
    assert hyperparameters.batch_size(10**6, 3) == 255
    given = dict.fromkeys(hyperparameters.DPO, "auto") | {"n_epochs": 2}
    resolved = hyperparameters.resolve(given, 10)
    assert resolved == {"n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": 1.0, "beta": 0.1}
    assert hyperparameters.steps(10, {"n_epochs": 2, "batch_size": 3}) == (4, 8)


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


# -- presets


def test_presets_are_read_and_refused_all_at_once(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text(
        "models:\n  tiny:\n    path: base\n    learning_rate: {dpo: 2.0e-5}\nqueue:\n  organizations: {a: {weight: 2}}\n"
    )
    found = presets.read(file)
    assert found.models["tiny"].base_rate("dpo") == 2e-5
    assert found.models["tiny"].base_rate("supervised") == 2e-4
    assert found.queue.of("a").weight == 2
    assert Preset("x", "p", adaptation={"name": "full"}).base_rate("dpo") == 2e-6
    file.write_text(
        "models:\n  Big/Name: {path: base}\n  a: {}\n  b: {path: base, adaptation: {name: nothing}, rank: 3}\n"
        "  c: {path: '${oc.env:HOME}', devices: 0}\n  d: {path: base, settings: {data: {packing: true}}}\n"
        "  e: {path: base, devices: 2, fewest_devices: 3, launch: {name: local, processes: 4}, revision: '${oc.env:A}'}\n"
        "  f: {path: base, launch: {name: slurm, partition: '${oc.env:B}'}}\n  g: {path: base, launch: {gpus: 1}}\n"
        "queue: {key: 3}\nfurther: 1\n"
    )
    with pytest.raises(UserError) as caught:
        presets.read(file)
    places = " ".join(problem.where for problem in caught.value.problems)
    for place in (
        "Big/Name",
        "models.a.path",
        "models.b.rank",
        "models.c.path",
        "models.c.devices",
        "d.settings",
        "models.e.fewest_devices",
        "models.e.launch.processes",
        "models.e.revision",
        "models.f.launch.partition",
        "models.g.launch.name",
        "queue.key",
        "further",
    ):
        assert place in places, place


def test_the_configuration_holds_no_text_that_is_read_again(tmp_path):
    folder = JobFolder(tmp_path)
    plan = configuration.Plan(
        "ftjob-1", "dpo", hyperparameters.resolve(dict.fromkeys(hyperparameters.DPO, "auto"), 10), 5
    )
    configuration.write(plan, Preset("tiny", "base", settings={"trainer": {"micro_batch_size": 2}}), folder)
    text = (tmp_path / "configuration" / "experiment" / "job.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    found = json.loads(text.partition("\n")[2])
    assert found["trainer"] == {"epochs": 10, "global_batch_size": 1, "seed": 5, "micro_batch_size": 1}
    for settings, size in (({}, 3), ({"micro_batch_size": 2}, 2), ({"micro_batch_size": "auto"}, "auto")):
        three = replace(plan, hyperparameters={**plan.hyperparameters, "batch_size": 3})
        made = configuration.experiment(three, Preset("tiny", "base", settings={"trainer": settings}), folder)
        assert made["trainer"]["micro_batch_size"] == size
    assert (found["task"], found["optimizer"]["lr"]) == ({"loss": "dpo", "beta": 0.1}, 2e-5)
    assert configuration.arguments(folder) == ["--config-dir", str(tmp_path / "configuration"), "experiment=job"]
    with pytest.raises(AssertionError):
        configuration.write(plan, Preset("tiny", "${oc.env:HOME}"), folder)


def test_names():
    name = new_name("qwen3-4b", "Meine Org", "Größe 1! " + "x" * 80, 12)
    assert name.startswith("ft:qwen3-4b:meine-org:gr-e-1-xxx")
    assert name.endswith(":ckpt-step-12")
    assert len(name) < 256
    assert new_name("a", "b", None).startswith("ft:a:b::")
    assert len({new_name("a", "b", None) for _ in range(100)}) == 100


def test_plans_are_read():
    fits = {
        "choices": [{"fits": True}],
        "fits": True,
        "configured": {"fits": True, "memory_gib_per_rank": 3.0, "step_seconds": 0.8},
    }
    found = planner.read(0, json.dumps(fits, indent=1))
    assert (found.fits, found.memory_gib, found.row_seconds) == (True, 3.0, 0.1)
    no = {
        "choices": [{"fits": False}],
        "fits": False,
        "configured": {"fits": False, "memory_gib_per_rank": 300.0},
        "hardware": {"device": "H100", "memory_gib": 80.0},
    }
    assert planner.read(0, json.dumps(no)).reason == "a rank needs 300.0 GiB at least, and H100 has 80.0 GiB"
    refused = {"error": {"problems": [{"where": "model.path", "reason": "there is no such model"}]}}
    assert planner.read(2, json.dumps(refused)).reason == "model.path: there is no such model"
    assert planner.read(1, "Traceback").fits


# -- processes


def test_a_process_gets_no_key_of_the_server():
    given = {
        "PATH": "/bin", "HOME": "/root", "WANDB_API_KEY": "k", "OPENAI_API_KEY": "k", "HF_TOKEN": "k", "DATABASE": "x",
        "https_proxy": "http://user:password@proxy", "http_proxy": "http://proxy", "DSTUNE_SECRET": "k", "CUDA_HOME": "/cuda",
        "SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "k",
    }  # fmt: skip
    kept = {"PATH", "HOME", "http_proxy", "CUDA_HOME", "SLURM_CONF"}
    assert set(environment(given)) - {"PYTHONPATH", "PYTHONSAFEPATH"} == kept
    assert device_environment([2, 0], ["a", "b", "c"]) == {"CUDA_VISIBLE_DEVICES": "c,a"}
    assert device_environment([0], []) == {}


def test_a_lock_is_held_as_long_as_a_process_or_its_training_lives(tmp_path):
    """Across the death of whoever started them."""
    folder = JobFolder(tmp_path)
    lock = folder.acquire()
    assert lock is not None
    program = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '60'], pass_fds=(int(sys.argv[1]),)); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(lock)], pass_fds=(lock,), start_new_session=True)
    os.close(lock)
    assert folder.is_alive()
    assert folder.acquire() is None
    assert not ProcessLauncher().start(folder, {"phase": "train"}, {})
    time.sleep(0.5)
    child.kill()
    child.wait()
    assert folder.is_alive()  # the grandchild
    os.killpg(child.pid, 9)
    deadline = time.monotonic() + 10
    while folder.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_validates_and_says_so(tmp_path):
    folder = JobFolder(tmp_path)
    write(folder.snapshot("training_file"), [MESSAGE] * 10)
    write(folder.snapshot("validation_file"), [MESSAGE] * 2)
    launcher = ProcessLauncher()
    task = {"phase": "validate", "method": "supervised", "training_file": "a", "validation_file": "b", "most_rows": 100}
    assert launcher.start(folder, task, {})
    deadline = time.monotonic() + 60
    while folder.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = json.loads(folder.validated.read_text())
    assert (found["training_file"], found["validation_file"]) == ({"rows": 10}, {"rows": 2})
    assert "10 example(s) of the training file are in the validation file too" in found["warnings"][0]
    assert folder.train.read_bytes() == folder.snapshot("training_file").read_bytes()
    launcher.reap()


def test_a_validation_ends_when_its_job_is_cancelled(tmp_path):
    """Whoever creates and cancels would have any number of them at work."""
    folder = JobFolder(tmp_path)
    os.mkfifo(folder.snapshot("training_file"))  # it never ends by itself
    launcher = ProcessLauncher()
    task = {"phase": "validate", "method": "supervised", "training_file": "a", "most_rows": 100}
    assert launcher.start(folder, task, {})
    folder.request_stop(NOW)
    deadline = time.monotonic() + 60
    while folder.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not folder.validated.exists()
    launcher.reap()


SQUEUE = """\
#!/bin/sh
case "$*" in
  *--name=*) if [ -e {0}/down ]; then rm {0}/down; echo "no controller" >&2; exit 1; fi; [ -e {0}/over ] || echo 41 ;;
  *) if [ -e {0}/over ]; then echo "Invalid job id" >&2; exit 1; fi; echo "41|41|RUNNING|None|node1" ;;
esac
"""


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("preempted", 75), ("failed", 1), ("", -1)])
def test_a_submission_that_nobody_noted_is_found_by_its_name(tmp_path, monkeypatch, status, code):
    """`sbatch` had worked, and whoever called it was killed: it is not called again, also while SLURM does not answer."""
    (tmp_path / "squeue").write_text(SQUEUE.format(tmp_path))
    (tmp_path / "squeue").chmod(0o755)
    (tmp_path / "down").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(process, "QUEUE_SECONDS", 0.05)
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)
    folder = JobFolder(tmp_path / f"ftjob-{'a' * 24}")
    folder.create()

    def end() -> None:
        while not (folder.run / "launch.json").exists():
            time.sleep(0.01)
        if status:
            (folder.run / "result.json").write_text(json.dumps({"status": status, "reason": ""}))
        (tmp_path / "over").touch()

    ending = threading.Thread(target=end)
    ending.start()
    assert process.Training(folder, 0, "slurm")._train() == (code, {})
    ending.join()
    assert not folder.report.exists()
    assert not process.Training(folder, 0, "slurm")._in_queue(), "the next attempt submits it again"


# -- metrics


def test_a_file_that_goes_back_to_a_checkpoint_is_read_anew(tmp_path):
    file = tmp_path / "metrics.jsonl"
    line = '{{"step": {0}, "epoch": {1}, "loss": {0}.5}}\n'
    file.write_text(
        "".join(line.format(n, n / 4) for n in range(1, 7)) + '{"step": 6, "eval/loss": 9.0}\n' + '{"step": 7, "lo'
    )
    reader = metrics.Reader(file)
    assert [step.number for step in reader.read()] == [1, 2, 3, 4, 5, 6]
    assert reader.steps[6].values == {"train_loss": 6.5, "full_valid_loss": 9.0}
    kept = "".join(line.format(n, n / 4) for n in range(1, 5))
    file.write_text(kept)
    assert [step.number for step in reader.read()] == [1, 2, 3, 4]
    file.write_text(kept + line.format(5, 1.25))
    assert [step.number for step in reader.read()] == [1, 2, 3, 4, 5]
    assert [step.number for step in reader.read() if step.ends_epoch] == [4]
    assert metrics.steps_per_epoch(reader.read()) == 4


def test_long_jobs_tell_some_of_their_steps():
    total = 1_250_000
    told = [step for step in range(1, total + 1) if metrics.becomes_event(step, total, ends_epoch=step % 25_000 == 0)]
    assert len(told) <= metrics.MOST_EVENTS + 50
    assert told[-1] == total
    assert all(metrics.becomes_event(step, 5000, ends_epoch=False) for step in range(1, 5001))


# -- whose turn it is


def waiting(number: int, organization: str, **changes: object) -> Waiting:
    return Waiting(
        **{
            "id": str(number),
            "number": number,
            "organization": organization,
            "key": organization,
            "seconds": 10.0,
            **changes,
        }
    )


def test_priority_then_use_then_age():
    queue = [waiting(1, "a"), waiting(2, "a"), waiting(3, "b"), waiting(4, "c", priority=1)]
    chosen = choose(queue, [], {"a": 50.0}, QueueSettings(), 3)
    assert [one.id for one, _ in chosen] == ["4", "3", "1"]
    assert [taken for _, taken in chosen] == [[0], [1], [2]]
    weights = QueueSettings(organizations={"a": Limits(weight=10)})
    assert choose(queue, [], {"a": 50.0, "b": 6.0}, weights, 2)[1][0].id == "1"


def test_limits_of_organizations_and_keys():
    queue = [waiting(n, "a", key="k") for n in range(4)] + [waiting(9, "b")]
    limited = QueueSettings(organization=Limits(running=2))
    assert [one.id for one, _ in choose(queue, [], {}, limited, 9)] == ["0", "9", "1"]
    by_key = QueueSettings(key=Limits(running=1))
    busy = [Busy("a", "k", "local", [0], 5.0)]
    assert [one.id for one, _ in choose(queue, busy, {}, by_key, 9)] == ["9"]


def test_a_large_job_is_not_passed_for_ever():
    queue = [waiting(1, "a", devices=4), waiting(2, "b"), waiting(3, "b", pool="slurm", devices=8)]
    busy = [Busy("c", "c", "local", [0, 1], 5.0)]
    assert [one.id for one, _ in choose(queue, busy, {}, QueueSettings(), 4)] == ["3"]
    assert choose(queue, [], {}, QueueSettings(), 4)[0] == (queue[0], [0, 1, 2, 3])
    full = [*busy, Busy("d", "d", "slurm", [], 5.0)]
    assert [one.id for one, _ in choose(queue, full, {}, QueueSettings(submitted=1), 4)] == []


def test_a_thousand_jobs_of_five_organizations(tmp_path, monkeypatch):
    """Listed within 50 ms, and started fairly: at any time each has what is its own, within 5% of all."""
    bench = Bench(tmp_path, devices=10)
    names = [bench.organization(name) for name in "abcde"]
    with bench.database.writing.begin() as session:
        for number in range(1000):
            # They come in very different order: the first one has all of its jobs before the others.
            row = bench.row(names[number // 200], state="queued", total_steps=8, rows=12)
            JobFolder.of(bench.folder, row.id).create()
            bench.store.add(session, row, [])
    project = names[2].replace("org-", "proj_")
    bench.store.page(project, Page(100), None)
    began = time.perf_counter()
    rows_found, more = bench.store.page(project, Page(100), None)
    assert (len(rows_found), more) == (100, True)
    assert time.perf_counter() - began < 0.05
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    started: Counter[str] = Counter()
    of = {}
    with bench.database.session() as session:
        from dstune.finetuning.jobs.tables import Job

        of = dict(session.query(Job.id, Job.organization).all())
    for turn in range(10):
        bench.step()
        for job in bench.launcher.trainings()[10 * turn :]:
            started[of[job]] += 1
            bench.train(job, 1, 8)
            bench.end(job, 0, exports=(8,), tokens=80)
        clock[0] += 30
        if turn > 1:
            even = sum(started.values()) / 5
            assert all(abs(started[name] - even) <= 0.05 * sum(started.values()) for name in names), started
    assert sum(started.values()) == 100
