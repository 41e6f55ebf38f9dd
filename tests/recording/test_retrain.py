"""`dstune retrain`: what becomes of a recorded job's settings, on this machine and on another server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest
import yaml

from dstune.config.compose import compose
from dstune.config.plain_file import expand
from dstune.core.errors import UserError
from dstune.recording.command import main as record
from dstune.recording.retrain import job_body, main, read_job
from tests.support.hosted_double import Hosted, serving
from tests.support.offices import Office, in_office

PAIR = {
    "input": {"messages": [{"role": "user", "content": "hi"}]},
    "preferred_output": [{"role": "assistant", "content": "good"}],
    "non_preferred_output": [{"role": "assistant", "content": "bad"}],
}
GRADER = {
    "type": "string_check",
    "name": "right",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "a",
}


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """Return a function that records the jobs of a service and returns the folder."""

    def recorded(hosted: Hosted, name: str = "recording") -> Path:
        monkeypatch.setenv("OPENAI_API_KEY", hosted.key)
        monkeypatch.chdir(tmp_path)
        with serving(hosted) as url:
            assert record([name, "--server", f"{url}/v1"]) == 0
        return Path(name)

    return recorded


def settings(file: str) -> dict:
    """The configuration, which is composed once to see that `dstune train` takes it."""
    content = yaml.safe_load(Path(file).read_text())
    config = compose(expand([file])).config
    assert config.run.dir == content["run"]["dir"]
    return content


def test_every_hyperparameter_of_a_supervised_job_is_translated(recording, capsys):
    hosted = Hosted(jobs=2)
    hosted.jobs[0] |= {"validation_file": "file-train1", "user_provided_suffix": "support ${oc.env:HOME}"}
    folder = recording(hosted)
    with pytest.raises(UserError, match="which job") as refusal:
        main([str(folder)])
    assert "ft:gpt-4o-2024-08-06:acme::1" in refusal.value.problems[0].fix
    capsys.readouterr()
    name = "ft:gpt-4o-2024-08-06:acme::0"
    assert main([str(folder), "--job", name, "--hardware", "1xH100"]) == 0
    content, printed = settings("retrain.yaml"), capsys.readouterr().out
    assert content["trainer"] == {"epochs": 3, "global_batch_size": 4, "seed": 7}
    assert content["optimizer"] == {"lr": pytest.approx(1.8 * 2e-4)}
    assert content["task"] == "chat" and content["method"] == "lora" and content["model"] == "qwen3_8b"
    assert content["data"]["train"] == "recording/files/file-train0.jsonl"
    assert content["data"]["validation"] == "recording/files/file-train1.jsonl"
    assert content["run"]["name"] == "support-oc.env-HOME"
    for line in ("trainer.epochs: 3  # the job's n_epochs", "times the job's learning_rate_multiplier 1.8"):
        assert line in printed
    assert "base models that fit on 1 x H100-80G: qwen3_8b (lora), qwen3_4b (lora)" in printed
    assert f"dstune serve {name}=runs/support-oc.env-HOME" in printed
    with pytest.raises(UserError, match="exists already"):
        main([str(folder), "--job", name])


def test_settings_of_the_user_and_of_smaller_hardware_come_first(recording, capsys):
    folder = recording(Hosted(jobs=1))
    assert main([str(folder), "trainer.epochs=1", "--hardware", "1xRTX3060"]) == 0
    small = settings("retrain.yaml")
    assert small["trainer"]["epochs"] == 1 and small["model"] != "qwen3_8b" and small["data"]["split.validation"] == 0
    assert main([str(folder), "model=llama3_8b", "optimizer.lr=1e-5", "--force", "--hardware", "1xH100"]) == 0
    content = settings("retrain.yaml")
    assert content["model"] == "llama3_8b" and float(content["optimizer"]["lr"]) == 1e-5


def test_what_a_job_left_to_the_service_or_a_hostile_one_says_is_not_believed(recording, capsys):
    hosted = Hosted(jobs=1)
    hosted.jobs[0]["hyperparameters"] = {
        "n_epochs": "auto", "batch_size": "${oc.env:OPENAI_API_KEY}", "learning_rate_multiplier": -1, "prompt_loss_weight": 0.1
    }  # fmt: skip
    hosted.jobs[0] |= {"id": "ftjob\n${x}", "seed": -3, "integrations": [{"type": "wandb"}]}
    assert main([str(recording(hosted))]) == 0
    content, printed = settings("retrain.yaml"), capsys.readouterr().out
    assert "lr" not in content.get("optimizer", {}) and "seed" not in content["trainer"]
    assert "n_epochs: auto in the job" in printed and "is no number of this hyperparameter" in printed
    assert "prompt_loss_weight: 0.1 has no counterpart" in printed and "integrations is left out" in printed
    assert "${" not in Path("retrain.yaml").read_text() and content["run"]["name"] == "ftjob-x"


def test_pairs_and_graders(recording, capsys):
    hosted = Hosted(jobs=1)
    hosted.contents["file-train0"] = (json.dumps(PAIR) + "\n").encode() * 12
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "batch_size": 8, "beta": 0.3}}}
    hosted.jobs[0] |= {"method": method, "hyperparameters": None}
    folder = recording(hosted)
    assert main([str(folder)]) == 0
    content = settings("retrain.yaml")
    assert content["task"] == {"name": "preference", "loss": "dpo", "beta": 0.3}
    assert content["trainer"]["global_batch_size"] == 8

    hosted = Hosted(jobs=1)
    hosted.jobs[0]["id"] = "ftjob-graded"
    hosted.jobs[0]["training_file"] = "file-questions"
    hosted.contents["file-questions"] = b'{"messages": [{"role": "user", "content": "1 + 1?"}]}\n' * 12
    options = {"grader": GRADER, "hyperparameters": {"compute_multiplier": 0.5, "n_epochs": 1, "eval_interval": 3}}
    hosted.jobs[0]["method"] = {"type": "reinforcement", "reinforcement": options}
    folder = recording(hosted, "graded")
    assert main([str(folder), "--output", "graded.yaml"]) == 0
    content = settings("graded.yaml")
    assert content["task"]["samples"] == 4 and content["task"]["graders"] == ["graded.grader.json"]
    assert json.loads(Path("graded.grader.json").read_text()) == GRADER
    assert "eval_interval: 3 has no counterpart" in capsys.readouterr().out


def test_the_fine_tuning_api_takes_the_job_and_its_model_answers_to_the_old_name(recording, tmp_path):
    """`dstune serve`'s own API reads files and body; the alias is for those who may use the tuned model."""
    hosted = Hosted(jobs=1)
    hosted.jobs[0] |= {"validation_file": "file-train0", "user_provided_suffix": "support"}
    folder, old = recording(hosted), hosted.jobs[0]["fine_tuned_model"]

    async def submit(office: Office) -> None:
        key = tmp_path / "key"
        key.write_text(office.cloud.key)
        key.chmod(0o600)
        words = [str(folder), "--server", f"{office.cloud.url}/v1", "--model", "tiny", "--key-file", str(key)]
        assert await asyncio.to_thread(main, words) == 0
        client = office.cloud.openai()
        (job,) = [job async for job in client.fine_tuning.jobs.list()]
        assert (job.model, job.seed) == ("tiny", 7) and job.method.type == "supervised"
        values = job.method.supervised.hyperparameters
        assert (values.n_epochs, values.batch_size, values.learning_rate_multiplier) == (3, 4, 1.8)
        assert job.metadata == {"recorded_job": "ftjob-0", "recorded_model": old}
        for identifier in (job.training_file, job.validation_file):
            assert (await client.files.content(identifier)).read() == hosted.contents["file-train0"]
            assert (await client.files.retrieve(identifier)).filename == "file-train0.jsonl"
        await office.reach(client, job.id, "running")
        office.train(job.id, 12)
        office.finish(job.id, exports=(4, 8, 12))
        done = await office.reach(client, job.id, "succeeded", "failed")
        assert done.status == "succeeded", done.error
        name = done.fine_tuned_model
        aliases = office.cloud.gateway.admission._settings.aliases
        aliases[old] = name
        assert (await client.models.retrieve(old)).id == old
        assert old in [model.id async for model in client.models.list()]
        stranger = office.cloud.openai(office.cloud.other)
        assert old not in [model.id async for model in stranger.models.list()]
        with pytest.raises(openai.NotFoundError):
            await stranger.models.retrieve(old)

    in_office(tmp_path / "office", submit)


def test_the_body_names_what_the_job_had(recording):
    job = read_job(recording(Hosted(jobs=1)), None)
    body = job_body(job, "qwen3-4b", "file-a", None)
    assert "validation_file" not in body and "suffix" not in body and body["seed"] == 7


@pytest.mark.parametrize(
    "change", [{"training_file": "file-gone"}, {"method": {"type": "distill"}}, {"fine_tuned_model": None}]
)
def test_jobs_that_cannot_be_repeated_are_refused(recording, change):
    hosted = Hosted(jobs=1)
    hosted.jobs[0] |= change
    with pytest.raises(UserError, match=r"not in the recording|does not have its method|made a model"):
        main([str(recording(hosted))])
    assert not Path("retrain.yaml").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--server", "http://127.0.0.1:1/v1"],
        ["--model", "x"],
        ["--server", "http://127.0.0.1:1/v1", "--model", "x", "a=b"],
    ],
)
def test_flags_that_do_not_go_together(recording, words):
    with pytest.raises(UserError, match="--server"):
        main([str(recording(Hosted(jobs=1))), *words])
