"""A model of a hosted service, from its job to the open model that answers under its name, with real trainings and servers."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import openai
import pytest

from tests.support.cloud_server import Server, wait_for
from tests.support.command import Commands
from tests.support.tiny import WORDS, save_decoder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
SETTINGS = {"trainer": {"precision": "fp32", "micro_batch_size": 16}, "data": {"workers": 1}, "zero": {"stage": 0}}
CLASSES = ("w1", "w2")
SEEDS = (11, 12, 13)
MARGIN = "0.05"


def write_requests(path: Path, rows: int, seed: int) -> Path:
    """Write requests whose class is the half of the words that most of theirs are from."""
    choose, half = random.Random(seed), len(WORDS) // 2
    with path.open("w") as stream:
        for _ in range(rows):
            at = choose.randrange(2)
            halves = (WORDS[:half], WORDS[half:])
            words = [choose.choice(halves[at if choose.random() < 0.85 else 1 - at]) for _ in range(11)]
            messages = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": CLASSES[at]}]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path


def private(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def presets(base) -> dict:
    adaptation = {"name": "lora", "rank": 16}
    tiny = {"path": str(base), "adaptation": adaptation, "learning_rate": {"supervised": 0.01}, "max_length": 64}
    return {"models": {"tiny": tiny | {"settings": SETTINGS}}}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, base, presets) -> tuple[Path, str]:
    """The folder of a recording of a service that has since ended, and the name of the model that it tuned."""
    folder = tmp_path_factory.mktemp("customer")
    training = write_requests(folder / "training.jsonl", 800, 1)
    validation = write_requests(folder / "validation.jsonl", 900, 2)
    with Server(private(folder / "service"), presets, f"tiny={base}") as service:
        client = service.client()
        files = [client.files.create(file=path, purpose="fine-tune").id for path in (training, validation)]
        job = client.fine_tuning.jobs.create(
            model="tiny", training_file=files[0], validation_file=files[1], suffix="desk", seed=7,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 16}}},
        )  # fmt: skip
        name = wait_for(client, job.id, "succeeded").fine_tuned_model
        commands = Commands(folder)
        commands.env["OPENAI_API_KEY"] = client.api_key
        words = ["recording", "--server", service.url, "--prompts-of", "validation", "--max-tokens", "4"]
        done = commands.run("record", *words, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout, done.stderr)
    assert "not recorded" not in done.stderr
    return folder, name


@pytest.fixture(scope="module")
def retrained(recorded, base) -> tuple[Path, str]:
    """The same, with a run for each seed of the job, trained again by the configuration that `dstune retrain` writes."""
    folder, name = recorded
    commands = Commands(folder)
    settings = [f"model.path={base}", "method=full", "optimizer.lr=0.003", "data.max_length=64", "data.workers=1"]
    settings += ["trainer.precision=fp32", "trainer.micro_batch_size=16", "launch.processes=1"]
    done = commands.run("retrain", "recording", "--job", name, "--output", "desk.yaml", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    for seed in SEEDS:
        done = commands.run("train", "desk.yaml", f"trainer.seed={seed}", f"run.dir=runs/{seed}", timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder, name


def compare(folder: Path, name: str, new: str, *flags: str) -> tuple[int, dict, str]:
    """Return the exit code of `dstune compare`, its results and what it printed."""
    output = "-".join(["comparison", *re.findall(r"\w+", " ".join([new, *flags]))])[:100]
    words = ["recording", new, "--old-model", name, "--margin", MARGIN, "--output", output, *flags]
    done = Commands(folder).run("compare", *words, timeout=900)
    print(done.stdout, done.stderr)
    return done.returncode, json.loads((folder / output / "comparison.json").read_text()), done.stdout


def test_runs_that_were_trained_again_pass(retrained):
    folder, name = retrained
    verdicts = Counter()
    for seed in SEEDS:
        code, result, _ = compare(folder, name, f"runs/{seed}")
        assert (code == 0) == (result["verdict"] == "passed")
        verdicts[result["verdict"]] += 1
    assert verdicts["passed"] >= 2 and not verdicts["worse"], verdicts
    assert all(gate["name"].startswith("classes") for gate in result["gates"])


def test_runs_of_a_tenth_of_the_rows_are_worse(retrained):
    """As where somebody found only a part of their files."""
    folder, name = retrained
    commands = Commands(folder)
    for seed in SEEDS:
        few = write_requests(folder / f"few-{seed}.jsonl", 48, seed)
        words = [f"data.train={few}", f"trainer.seed={seed}", f"run.dir=runs/few-{seed}"]
        done = commands.run("train", "desk.yaml", *words, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        code, result, _ = compare(folder, name, f"runs/few-{seed}")
        assert (code, result["verdict"]) == (1, "worse"), result["gates"]


def test_few_prompts_decide_nothing_and_the_report_says_how_many_would(retrained):
    folder, name = retrained
    lines = (folder / "validation.jsonl").read_text().splitlines(keepends=True)
    (folder / "few-prompts.jsonl").write_text("".join(lines[:40]))
    code, result, printed = compare(folder, name, f"runs/{SEEDS[0]}", "--prompts", "few-prompts.jsonl")
    assert (code, result["verdict"]) == (1, "undecided"), result["gates"]
    assert all(gate["rows_needed"] > 40 for gate in result["gates"]) and "rows" in printed


def ask(client: openai.OpenAI, name: str, row: str) -> str:
    messages = json.loads(row)["messages"][:1]
    return (
        client.chat.completions.create(model=name, messages=messages, max_tokens=4, temperature=0)
        .choices[0]
        .message.content
    )


def test_the_new_model_answers_the_official_client_under_the_old_name(retrained, presets):
    folder, name = retrained
    lines = (folder / "validation.jsonl").read_text().splitlines()[:20]
    with Server(
        private(folder / "server"), presets, f"desk={folder / 'runs' / str(SEEDS[0])}", "--alias", f"{name}=desk"
    ) as server:
        client = server.client(_strict_response_validation=True)
        assert name in [model.id for model in client.models.list()]
        answers = [ask(client, name, line) for line in lines]
        assert set(answers) == set(CLASSES)
        key = folder / "key"
        key.write_text(client.api_key)
        key.chmod(0o600)
        code, result, _ = compare(folder, name, server.url, "--new-key-file", str(key))
    _, local, _ = compare(folder, name, f"runs/{SEEDS[0]}")
    assert (code, result["verdict"]) == (int(local["verdict"] != "passed"), local["verdict"])
    scores = [[gate["candidate"] for gate in each["gates"]] for each in (result, local)]
    assert scores[0] == pytest.approx(scores[1], abs=0.003)


def test_a_server_with_the_api_trains_the_job_again_and_its_alias_answers(recorded, base, presets):
    folder, name = recorded
    server = Server(private(folder / "own"), presets, f"tiny={base}")
    with server:
        commands = Commands(folder)
        commands.env["DSTUNE_API_KEY"] = server.client().api_key
        words = [
            "recording",
            "--job",
            name,
            "--server",
            server.url,
            "--key-variable",
            "DSTUNE_API_KEY",
            "--model",
            "tiny",
        ]
        done = commands.run("retrain", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        (job,) = server.client().fine_tuning.jobs.list()
        tuned = wait_for(server.client(), job.id, "succeeded").fine_tuned_model
    again = Server(server.folder, presets, f"tiny={base}", "--alias", f"{name}={tuned}")
    with again:
        client = again.client(_strict_response_validation=True)
        lines = (folder / "validation.jsonl").read_text().splitlines()[:20]
        assert [ask(client, name, line) for line in lines] == [ask(client, tuned, line) for line in lines]
        assert client.models.retrieve(name).id == name
        commands.env["OPENAI_API_KEY"] = client.api_key
        words = ["recording", again.url, "--old-model", name, "--margin", MARGIN, "--output", "comparison-alias"]
        done = commands.run("compare", *words, timeout=900)
    print(done.stdout, done.stderr)
    assert json.loads((folder / "comparison-alias" / "comparison.json").read_text())["verdict"] == "passed"
