"""A value from the environment is used by a real run, and found nowhere: files, stores, logs, messages, processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
from support.command import Commands, metrics, ranks_of, result, wait_until
from support.tiny import save_decoder, write_dialogues

WANDB = Path(sys.executable).with_name("wandb")

FOLDER, TAG, KEY, TOKEN, STORE = (
    f"planted{name}0123456789" for name in ("folder", "tag", "wandbkey", "hftoken", "store")
)
PLANTED = [FOLDER, TAG, KEY, TOKEN, STORE]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    """A workplace whose model and rows lie in a folder of which only the environment knows the name."""
    folder = tmp_path_factory.mktemp("secrets")
    hidden = tmp_path_factory.mktemp("hidden") / FOLDER
    save_decoder(hidden / "model")
    write_dialogues(hidden / "dialogues.jsonl", 60)
    commands = Commands(folder)
    commands.env |= {
        "HIDDEN_FOLDER": str(hidden),
        "HIDDEN_TAG": TAG,
        "HIDDEN_STORE": f"{hidden.parent}/{STORE}",
        "WANDB_API_KEY": KEY,
        "HF_TOKEN": TOKEN,
        "HOME": str(folder / "home"),
    }
    commands.env.pop("WANDB_MODE", None)
    (folder / "home").mkdir()
    return commands


def overrides(name: str, *further: str) -> list[str]:
    return [
        "model.path=${oc.env:HIDDEN_FOLDER}/model",
        "data.train=${oc.env:HIDDEN_FOLDER}/dialogues.jsonl",
        "data.max_length=64",
        "data.packing=false",
        "zero=stage2",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=4",
        "trainer.max_steps=8",
        "checkpoint.every=2",
        "evaluate.every=2",
        "evaluate.samples=2",
        "evaluate.max_new_tokens=4",
        "launch.processes=2",
        "tracking.tags=[plain,'${oc.env:HIDDEN_TAG}']",
        "tracking.notes='about ${oc.env:HIDDEN_TAG}'",
        "tracking.wandb.mode=offline",
        "tracking.tensorboard=true",
        "tracking.mlflow.uri=${oc.env:HIDDEN_STORE}",
        f"run.dir={name}",
        *further,
    ]


def holding(folder: Path) -> list[str]:
    """Files below `folder` with a planted value in their name or content, unpacked where they are archives."""
    found = []
    for path in folder.rglob("*"):
        contents = [os.fsencode(path.relative_to(folder))]
        if path.is_file():
            contents.append(path.read_bytes())
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    contents += [archive.read(name) for name in archive.namelist()]
        found += [f"{path}: {value}" for value in PLANTED if any(value.encode() in content for content in contents)]
    return found


def records(run_dir: Path) -> str:
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [str(WANDB), "leet", "inspect", "--json", str(folder)]
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(run_dir)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout


def mentioned(text: str) -> list[str]:
    return [value for value in PLANTED if value in text]


@pytest.fixture(scope="module")
def run_dir(workplace) -> Path:
    """Killed at step 5, refused once, continued to the end; what the ranks show of themselves is noted on the way."""
    run_dir = workplace.folder / "run"
    command = workplace.start("train", *overrides("run"))
    wait_until(lambda: any(row["step"] >= 5 for row in metrics(run_dir)))
    family = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    workplace.processes = {}
    for process in family:
        command_and_environment = (" ".join(process.cmdline()), process.environ())
        workplace.processes[process.pid] = command_and_environment
    ranks = {int(rank.environ()["RANK"]): rank for rank in ranks_of(run_dir)}
    workplace.ranks = {number: rank.environ() for number, rank in ranks.items()}
    ranks[1].kill()
    assert command.wait(timeout=60) == 1
    workplace.printed = workplace.log
    refused = workplace.run("train", "run", "trainer.global_batch_size=6")
    assert refused.returncode == 2, refused.stderr
    done = workplace.run("train", *overrides("run"))
    assert done.returncode == 0, done.stdout + done.stderr
    workplace.printed += refused.stdout + refused.stderr + done.stdout + done.stderr
    return run_dir


def test_no_file_of_the_run_holds_a_planted_value(run_dir):
    assert result(run_dir)["status"] == "completed"
    assert {"tensorboard", "wandb", "mlflow-id", "export", "checkpoints", "logs"} <= {
        path.name for path in run_dir.iterdir()
    }
    assert holding(run_dir) == []
    assert "${oc.env:HIDDEN_FOLDER}/model" in (run_dir / "environment.json").read_text()


def test_no_message_of_the_command_holds_one(workplace, run_dir):
    assert "loss" in workplace.printed
    assert mentioned(workplace.printed) == []


def test_wandb_file_holds_references_decoded_as_well(run_dir):
    text = records(run_dir)
    assert "${oc.env:HIDDEN_TAG}" in text and "${oc.env:HIDDEN_FOLDER}/model" in text
    assert mentioned(text) == []


def test_mlflow_store_holds_references(workplace, run_dir):
    store = Path(workplace.env["HIDDEN_STORE"])
    contents = b"".join(path.read_bytes() for path in store.rglob("*") if path.is_file())
    assert b"${oc.env:HIDDEN_TAG}" in contents
    assert [value for value in (FOLDER, TAG, KEY, TOKEN) if value.encode() in contents] == []


def test_no_command_line_shows_one_and_ranks_get_what_they_need(workplace, run_dir):
    assert len(workplace.processes) >= 4  # the command, its guard and two ranks at least
    assert mentioned(" ".join(line for line, _ in workplace.processes.values())) == []
    for environment in workplace.ranks.values():
        assert mentioned(environment["HIDDEN_FOLDER"]) == [FOLDER]  # what run.yaml refers to
        assert "HF_TOKEN" not in environment
        assert "WANDB_API_KEY" not in environment  # an offline run needs none


def test_no_planted_value_is_in_the_cache_beside_the_run(workplace, run_dir):
    assert holding(workplace.folder / "home") == []


@pytest.mark.parametrize(
    "further",
    [
        ["data.train=${oc.env:HIDDEN_FOLDER}/none.jsonl"],
        ["model.path=${oc.env:HIDDEN_FOLDER}/none"],
        ["model.chat_template=${oc.env:HIDDEN_FOLDER}/none.jinja"],
        ["data.format=${oc.env:HIDDEN_TAG}"],
        ["trainer.max_steps=${oc.env:HIDDEN_TAG}"],
        ["run.resume=${oc.env:HIDDEN_FOLDER}"],
        ["run.name=${oc.env:HIDDEN_TAG}", "tracking.project=${oc.env:HIDDEN_TAG}"],
    ],
    ids=lambda further: further[0].split("=")[0],
)
def test_a_refused_start_names_the_reference(workplace, further):
    refused = workplace.run("train", *overrides("refused", *further))
    assert refused.returncode == 2, refused.stderr
    assert "${oc.env:HIDDEN" in refused.stderr
    assert mentioned(refused.stdout + refused.stderr) == []


def test_a_row_that_the_ranks_refuse_is_reported_by_the_reference(workplace):
    rows = Path(workplace.env["HIDDEN_FOLDER"]) / "broken.jsonl"
    rows.write_text('{"messages": 3}\n')
    refused = workplace.run("train", *overrides("broken", "data.train=${oc.env:HIDDEN_FOLDER}/broken.jsonl"))
    assert refused.returncode == 2
    assert "${oc.env:HIDDEN_FOLDER}/broken.jsonl:1" in refused.stderr
    assert mentioned(refused.stdout + refused.stderr) == []


def test_a_crash_of_a_rank_leaves_a_traceback_without_it(workplace):
    """Weights that do not fit the model's description: transformers names file and folder."""
    hidden = Path(workplace.env["HIDDEN_FOLDER"])
    shutil.copytree(hidden / "model", hidden / "torn", dirs_exist_ok=True)
    weights = hidden / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    failed = workplace.run("train", *overrides("torn", "model.path=${oc.env:HIDDEN_FOLDER}/torn"))
    assert failed.returncode in (1, 2)
    assert mentioned(failed.stdout + failed.stderr) == []
    if (workplace.folder / "torn").exists():
        assert holding(workplace.folder / "torn") == []


@pytest.mark.ci
def test_inside_the_deepspeed_launcher(workplace):
    launcher = Path(sys.executable).with_name("deepspeed")
    workplace.env["PATH"] = f"{launcher.parent}:{workplace.env['PATH']}"
    workplace.env["DS_ACCELERATOR"] = "cpu"
    program = (str(launcher), "--num_gpus", "2", "--master_port", "29719", "--no_local_rank", "--module", "dstune")
    done = workplace.run("train", *overrides("inside", "trainer.max_steps=3"), program=program)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert holding(workplace.folder / "inside") == []
    own = "\n".join(line for line in (done.stdout + done.stderr).splitlines() if "[launch.py" not in line)
    assert mentioned(own) == []
