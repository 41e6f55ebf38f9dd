"""Jobs through the API by the official client, on models that are really trained and served.

Groups 1, 5, 6 and 11 of the API's contract: the whole path; kills; pause, resume, cancel; arithmetic of rows and steps.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from dstune.finetuning.jobs import check
from tests.support.cloud_server import Server, job_processes, wait_for
from tests.support.command import Commands, exact, metrics, wait_until
from tests.support.tiny import save_decoder, write_dialogues, write_preferences

pytestmark = pytest.mark.timeout(1800)  # several trainings and starts of servers each, also beside other work
FLOW = Path(__file__).parents[1] / "support" / "client_flow.py"
until = partial(wait_until, timeout=900)
SETTINGS = {"trainer": {"precision": "fp32", "micro_batch_size": 2}, "data": {"workers": 1}, "zero": {"stage": 0}}


def presets(base: Path, **changes: Any) -> dict[str, Any]:
    tiny = {
        "path": str(base), "adaptation": {"name": "lora", "rank": 4}, "learning_rate": {"supervised": 0.01, "dpo": 0.01},
        "max_length": 128, "settings": SETTINGS, **changes,
    }  # fmt: skip
    return {"models": {"tiny": tiny}}


def chat_rows(path: Path, rows: int, seed: int = 0) -> Path:
    return write_dialogues(path, rows, seed=seed)


def pair_rows(path: Path, rows: int) -> Path:
    """As the API has pairs."""
    lines = []
    for line in write_preferences(path, rows).read_text().splitlines():
        row = json.loads(line)
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        answers = [
            row[name] if isinstance(row[name], list) else [{"role": "assistant", "content": row[name]}]
            for name in ("chosen", "rejected")
        ]
        pair = {"input": {"messages": prompt}, "preferred_output": answers[0], "non_preferred_output": answers[1]}
        lines.append(json.dumps(pair))
    path.write_text("\n".join(lines) + "\n\n")
    return path


def uploaded(client: openai.OpenAI, path: Path) -> str:
    return client.files.create(file=path, purpose="fine-tune").id


def supervised(**given: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": given}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def server(tmp_path_factory, base):
    with Server(tmp_path_factory.mktemp("cloud"), presets(base), f"tiny={base}") as found:
        yield found


def test_from_an_upload_to_an_answer_of_the_tuned_model(server, tmp_path):
    """Ten rows, batches of three, two epochs: eight steps, checkpoints at 4 and 8 (groups 1 and 11). Every answer has the types
    that the client knows."""
    client = server.client(max_retries=2, _strict_response_validation=True)
    data = chat_rows(tmp_path / "rows.jsonl", 10)
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes() + b"\n")  # a byte-order mark and a blank line
    held_out = uploaded(client, chat_rows(tmp_path / "held_out.jsonl", 6, seed=1))
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=uploaded(client, data), validation_file=held_out, suffix="Über ${oc.env:HOME}", seed=7,
        method=supervised(n_epochs=2, batch_size=3), metadata={"a b": "ü&=", "path": "../../x"},
    )  # fmt: skip
    assert job.status == "validating_files"
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (2, "auto")
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={"a b": "ü&="})] == [job.id]
    job = wait_for(client, job.id, "succeeded")
    assert (job.hyperparameters.learning_rate_multiplier, job.seed, job.error) == (1.0, 7, None)
    assert job.trained_tokens == metrics(server.job_folder(job.id) / "run")[-2]["tokens"]
    name = job.fine_tuned_model
    assert name.startswith("ft:tiny:default:ber-oc-env-home:")

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    steps = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in steps] == list(range(8, 0, -1))
    assert {event.data["total_steps"] for event in steps} == {8}
    assert "full_valid_loss" in steps[0].data
    assert "full_valid_mean_token_accuracy" in steps[4].data
    assert len({event.id for event in events}) == len(events)
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [one.step_number for one in checkpoints] == [8, 4]
    assert checkpoints[0].fine_tuned_model_checkpoint == name
    assert checkpoints[0].metrics.full_valid_loss == pytest.approx(steps[0].data["full_valid_loss"])
    content = client.files.content(job.result_files[0]).read().decode()
    table = list(csv.DictReader(io.StringIO(content)))
    assert [int(row["step"]) for row in table] == list(range(1, 9))
    assert [bool(row["valid_loss"]) for row in table] == [False, False, False, True, False, False, False, True]

    assert name in [model.id for model in client.models.list()]
    asked = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 8, "temperature": 0}
    tuned = client.chat.completions.create(model=name, **asked).choices[0].message.content
    early = checkpoints[1].fine_tuned_model_checkpoint
    assert client.chat.completions.create(model=early, **asked).model
    assert client.chat.completions.create(model="tiny", **asked).choices[0].message.content != tuned
    export = server.job_folder(job.id) / "models" / "step-8"
    said = Commands(tmp_path).run("generate", str(export), "--prompt", "w1 w2", "--max-new-tokens", "8", "--json")
    assert json.loads(said.stdout)["answer"] == tuned, said.stderr
    assert client.models.delete(name).deleted
    for gone in (lambda: client.models.retrieve(name), lambda: client.chat.completions.create(model=name, **asked)):
        with pytest.raises(openai.NotFoundError):
            gone()
    again = client.fine_tuning.jobs.create(model=early, training_file=uploaded(client, data))
    assert client.fine_tuning.jobs.cancel(again.id).status == "cancelled"


@pytest.mark.slow
def test_the_last_client_of_version_1(server, tmp_path):
    """`pip install --target FOLDER openai==1.109.1`, which needs another httpx than the newest one."""
    folder = os.environ.get("DSTUNE_OPENAI_1", "")
    if not (Path(folder) / "openai").is_dir():
        pytest.skip("needs DSTUNE_OPENAI_1=FOLDER after `pip install --target FOLDER openai==1.109.1`")
    files = [chat_rows(tmp_path / "rows.jsonl", 12), chat_rows(tmp_path / "held_out.jsonl", 4, seed=1)]
    key = (server.state / "admin-key").read_text().strip()
    command = [sys.executable, str(FLOW), server.url, key, *map(str, files), "chats"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


def test_the_curve_is_that_of_dstune_train(server, base, tmp_path):
    """To the bit, of a command that is written by hand."""
    client = server.client()
    data = chat_rows(tmp_path / "rows.jsonl", 11)
    method = supervised(n_epochs=2, batch_size=4, learning_rate_multiplier=0.5)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client, data), seed=3, method=method)
    run = server.job_folder(job.id) / "run"
    wait_for(client, job.id, "succeeded")
    commands = Commands(tmp_path)
    trained = commands.run(
        "train", f"model.path={base}", f"data.train={data}", "data.split.validation=0", "data.packing=false",
        "data.max_length=128", "data.clean.duplicates=keep", "data.clean.leaks=false", "data.clean.unicode=false",
        "method=lora", "method.rank=4", "task=chat", "trainer.epochs=2", "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2", "trainer.precision=fp32", "trainer.seed=3", "data.split.seed=3", "optimizer.lr=0.005",
        "launch.processes=1", "zero=stage0", "tracking.wandb.mode=disabled", "run.dir=by_hand",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert exact(run) == exact(tmp_path / "by_hand")
    assert len(exact(run)) == 6


def test_a_paused_job_and_one_that_is_killed_end_with_the_weights_of_an_undisturbed_one(server, tmp_path):
    client = server.client()
    data = uploaded(client, chat_rows(tmp_path / "rows.jsonl", 12))
    given = {"model": "tiny", "training_file": data, "seed": 5, "method": supervised(n_epochs=10, batch_size=1)}
    undisturbed = client.fine_tuning.jobs.create(**given)
    wait_for(client, undisturbed.id, "succeeded")
    paused = client.fine_tuning.jobs.create(**given)
    for step in (10, 70):
        at_step(client, server, paused.id, step)
        assert client.fine_tuning.jobs.pause(paused.id).status == "pausing"
        found = wait_for(client, paused.id, "paused")
        assert client.fine_tuning.jobs.pause(paused.id).status == "paused"
        assert found.finished_at is None
        checkpoints = list(client.fine_tuning.jobs.checkpoints.list(paused.id))
        assert checkpoints[0].step_number >= step
        assert client.fine_tuning.jobs.resume(paused.id).status == "queued"
    wait_for(client, paused.id, "succeeded")
    assert weights(server, paused.id) == weights(server, undisturbed.id)
    told = [event.data["step"] for event in client.fine_tuning.jobs.list_events(paused.id, limit=100) if event.data]
    assert told == list(range(120, 0, -1))


def test_a_paused_job_goes_on_with_another_number_of_ranks(base, tmp_path):
    """One, three, two of them, as the operator's file says at each start."""
    given = presets(base)

    def offer(server: Server, devices: int) -> None:
        given["models"]["tiny"]["devices"] = devices
        server.presets.write_text(json.dumps(given))

    given["queue"] = {"devices": 3}
    with Server(tmp_path, given) as server:
        client = server.client()
        data = uploaded(client, chat_rows(tmp_path / "rows.jsonl", 12))
        asked = {"model": "tiny", "training_file": data, "seed": 5, "method": supervised(n_epochs=10, batch_size=4)}
        undisturbed = client.fine_tuning.jobs.create(**asked)
        wait_for(client, undisturbed.id, "succeeded")
        job = client.fine_tuning.jobs.create(**asked)
        for step, devices in ((3, 3), (15, 2)):
            at_step(client, server, job.id, step)
            client.fine_tuning.jobs.pause(job.id)
            wait_for(client, job.id, "paused")
            offer(server, devices)
            client.fine_tuning.jobs.resume(job.id)
            until(lambda number=devices: ranks(server, job.id) == number)
        wait_for(client, job.id, "succeeded")
        told = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert [sum(f"on {new} device(s), not on {old}" in text for text in told) for old, new in ((1, 3), (3, 2))] == [
            1,
            1,
        ]
        moved, stayed = (metrics(server.job_folder(one.id) / "run") for one in (job, undisturbed))
        losses = [[row["loss"] for row in rows if "loss" in row] for rows in (moved, stayed)]
        assert len(losses[1]) == 30
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def ranks(server: Server, job: str) -> int:
    """Living worker processes of a job."""
    return sum("dstune.worker" in process.cmdline() for process in job_processes(server.job_folder(job)))


def test_cancelling_ends_the_training_at_once(server, tmp_path):
    client = server.client()
    data = uploaded(client, chat_rows(tmp_path / "rows.jsonl", 12))
    job = client.fine_tuning.jobs.create(model="tiny", training_file=data, method=supervised(n_epochs=50, batch_size=1))
    at_step(client, server, job.id, 3)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    until(lambda: not job_processes(server.job_folder(job.id)))
    found = client.fine_tuning.jobs.retrieve(job.id)
    assert (found.status, found.fine_tuned_model, found.trained_tokens) == ("cancelled", None, None)
    for refused in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            refused(job.id)


def test_pairs(server, tmp_path):
    client = server.client()
    data = uploaded(client, pair_rows(tmp_path / "pairs.jsonl", 10))
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 5, "beta": 0.2}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=data, method=method)
    job = wait_for(client, job.id, "succeeded")
    assert job.method.dpo.hyperparameters.beta == 0.2
    steps = [event.data for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    assert [step["step"] for step in steps] == [2, 1]
    assert "train_reward_margin" in steps[0]
    asked = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(model=job.fine_tuned_model, **asked)
    assert answer.model == job.fine_tuned_model and 1 <= answer.usage.completion_tokens <= 8


def test_bad_rows_fail_the_job_with_their_line(server, tmp_path):
    client = server.client()
    data = chat_rows(tmp_path / "rows.jsonl", 10)
    lines = data.read_text().splitlines()
    for name, content, code, words in (
        ("few", lines[:9], "invalid_n_examples", "has 9 example(s), but must have at least 10"),
        ("broken", [*lines[:6], "{", *lines[7:]], "invalid_training_file", "line 7: is not JSON"),
        ("keys", [*lines[:3], '{"messages": [], "x": 1}', *lines], "invalid_training_file", "line 4: "),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(content))
        job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client, file))
        job = wait_for(client, job.id, "failed")
        assert (job.error.code, job.error.param) == (code, "training_file")
        assert words in job.error.message


def test_a_job_outlives_its_server_and_its_ranks(base, tmp_path):
    """Killed five times at random, server and ranks: the weights of an undisturbed job, and every step told once."""
    draw = random.Random(1)
    with Server(tmp_path, presets(base)) as server:
        client = server.client(max_retries=5)
        data = uploaded(client, chat_rows(tmp_path / "rows.jsonl", 30))
        given = {"model": "tiny", "training_file": data, "seed": 5, "method": supervised(n_epochs=50, batch_size=1)}
        undisturbed = client.fine_tuning.jobs.create(**given)
        wait_for(client, undisturbed.id, "succeeded")
        job = client.fine_tuning.jobs.create(**given)
        for number in range(5):
            at_step(client, server, job.id, 200 * number + 3)
            time.sleep(draw.random())
            server.kill()
            alive = job_processes(server.job_folder(job.id))
            assert alive, "the job goes on without the server"
            if number % 2:
                draw.choice(alive).kill()
            server.start()
            client = server.client(max_retries=5)
        wait_for(client, job.id, "succeeded")
        assert weights(server, job.id) == weights(server, undisturbed.id)
        told = [event.data["step"] for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.data]
        assert told == list(range(1500, 0, -1))
        server.stop()
        assert check.main([str(server.state), "--at-rest"]) == 0


@pytest.fixture
def control_groups():
    """Two of them, empty."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("needs control groups of version 2 that may be made (as root)")
    made = [root / f"dstune-{name}-{os.getpid()}" for name in ("server", "jobs")]
    for group in made:
        group.mkdir()
    yield made
    for group in made:
        end_group(group)
        until(lambda empty=group / "cgroup.procs": not empty.read_text())
        group.rmdir()


def entering(group: Path) -> list[str]:
    """What puts a command into a control group."""
    return ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)]


def end_group(group: Path) -> None:
    """As a service manager ends one, whatever sessions its processes have."""
    (group / "cgroup.kill").write_text("1")


@pytest.mark.slow
def test_a_job_outlives_the_control_group_of_its_server(base, tmp_path, control_groups):
    """Killed as a whole (group 5): a job with a group of its own, by `prefix`, trains on undisturbed; one without dies too, is
    continued, and ends with the same weights."""
    own, jobs = control_groups
    with Server(tmp_path, presets(base) | {"prefix": entering(jobs)}, enter=entering(own)) as server:
        client = server.client(max_retries=5)
        data = uploaded(client, chat_rows(tmp_path / "rows.jsonl", 12))
        given = {"model": "tiny", "training_file": data, "seed": 5, "method": supervised(n_epochs=20, batch_size=1)}
        found = []
        for prefix, interrupted in ((True, 0), (False, 1)):
            if not prefix:
                server.presets.write_text(json.dumps(presets(base)))
            job = client.fine_tuning.jobs.create(**given)
            at_step(client, server, job.id, 30)
            end_group(own)
            assert server.process is not None and server.process.wait(timeout=60) == -9
            until(lambda found=job.id, lives=prefix: bool(job_processes(server.job_folder(found))) is lives, timeout=60)
            if prefix:
                at_step_of(server, job.id, 60)
            server.start()
            client = server.client(max_retries=5)
            wait_for(client, job.id, "succeeded")
            found.append(weights(server, job.id))
            events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
            assert [event.data["step"] for event in events if event.data] == list(range(240, 0, -1))
            assert sum("was interrupted" in event.message for event in events) == interrupted
        assert found[0] == found[1]


@pytest.mark.slow
def test_a_container_that_is_stopped_has_its_jobs_save(base, tmp_path):
    """All processes end with its first one. The job goes on behind the step at which it was asked, not where its epoch began."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare (Debian: apt-get install util-linux)")
    enter = ["unshare", "--pid", "--fork", "--mount-proc"]
    with Server(tmp_path, presets(base), enter=enter) as server:
        client = server.client(max_retries=5)
        data = uploaded(client, chat_rows(tmp_path / "rows.jsonl", 300))
        given = {"model": "tiny", "training_file": data, "seed": 5, "method": supervised(n_epochs=1, batch_size=1)}
        job = client.fine_tuning.jobs.create(**given)
        at_step(client, server, job.id, 30)
        assert server.process is not None
        (first,) = psutil.Process(server.process.pid).children()
        first.terminate()
        assert server.process.wait(timeout=240) == 0
        assert not job_processes(server.job_folder(job.id))
        (saved,) = [int(path.name[5:]) for path in (server.job_folder(job.id) / "run" / "checkpoints").glob("step-*")]
        assert 30 <= saved < 300
        server.start()
        client = server.client(max_retries=5)
        wait_for(client, job.id, "succeeded")
        events = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert events.count(f"Fine-tuning job continues after step {saved}") == 1


def test_the_api_and_its_jobs_are_two_processes(base, tmp_path):
    """As two services, or two containers: the one that looks after jobs may be stopped and started alone."""
    with Server(tmp_path, presets(base), "--no-inference", "--jobs", "elsewhere") as server:
        client = server.client()
        job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client, chat_rows(tmp_path / "a", 9)))
        time.sleep(3)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
        command = [sys.executable, "-m", "dstune", "serve", "--jobs", "only", "--state", str(server.state)]
        runner = subprocess.Popen([*command, "--presets", str(server.presets)], env=server.env, start_new_session=True)
        try:
            assert wait_for(client, job.id, "failed").error.code == "invalid_n_examples"
        finally:
            runner.terminate()
            assert runner.wait(timeout=120) == 0


def weights(server: Server, job: str) -> bytes:
    """Of the final model."""
    folders = sorted((server.job_folder(job) / "models").iterdir(), key=lambda one: int(one.name.removeprefix("step-")))
    return (folders[-1] / "adapter_model.safetensors").read_bytes()


def at_step(client: openai.OpenAI, server: Server, job: str, step: int) -> None:
    wait_for(client, job, "running")
    at_step_of(server, job, step)


def at_step_of(server: Server, job: str, step: int) -> None:
    """The same of a job whose server does not answer."""
    until(lambda: any(row["step"] >= step for row in metrics(server.job_folder(job) / "run")[-2:]))
