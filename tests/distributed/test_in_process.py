"""`launch.in_process=true`: the rank is the process that was started, a debugger works in it, and the run is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.configs import run_config
from support.tiny import save_decoder, write_dialogues
from support.workshop import VOLATILE

from dstune.config.validate import find_problems
from dstune.launch.local.config import LocalConfig

PLUGIN = """
import os
import dstune

with open("processes", "a") as file:
    print(os.getpid(), file=file)

@dstune.callback
class Stops(dstune.Callback):
    name = "stops"

    def on_train_begin(self, run):
        answer = 42
        if os.environ.get("STOP_HERE"):
            breakpoint()

    def results(self):
        return {"process": os.getpid()}
"""


def train(
    folder: Path, name: str, *overrides: str, **environment: str
) -> tuple[subprocess.Popen, str, dict, list[dict]]:
    (folder / "own.py").write_text(PLUGIN)
    command = [
        *(
            sys.executable,
            "-m",
            "dstune",
            "train",
            f"model.path={folder / 'model'}",
            f"data.train={folder / 'rows.jsonl'}",
        ),
        *(
            "data=files",
            "data.max_length=64",
            "evaluate.every=0",
            "checkpoint.every=0",
            "trainer.max_steps=3",
            "trainer.micro_batch_size=2",
        ),
        *("trainer.global_batch_size=4", f"run.dir={folder / name}", "run.export=none", "launch.processes=1"),
        *("plugins=[./own.py]", "trainer.callbacks=[stops]", *overrides),
    ]
    variables = {**os.environ, "DSTUNE_CACHE": str(folder / "cache"), **environment}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=variables | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = process.communicate("p answer + 58\nc\n", timeout=300)
    assert process.returncode == 0, output
    rows = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    exact = [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]
    return process, output, json.loads((folder / name / "result.json").read_text()), exact


@pytest.mark.timeout(1200)
def test_the_rank_is_the_started_process_and_stops_at_breakpoints(tmp_path: Path):
    save_decoder(tmp_path / "model")
    write_dialogues(tmp_path / "rows.jsonl", 20)
    process, output, result, rows = train(tmp_path, "inside", "launch.in_process=true", STOP_HERE="1")
    assert result["status"] == "completed" and result["process"] == process.pid
    assert "100" in output and "(Pdb)" in output
    process, _, result, expected = train(tmp_path, "outside")
    assert result["process"] != process.pid
    assert rows == expected

    evaluated = []
    for where in ("false", "true"):
        (tmp_path / "processes").unlink()
        done = dstune(tmp_path, "evaluate", "outside", "--json", "--split", "train", f"launch.in_process={where}")
        assert done.returncode == 0, done.stderr
        evaluated.append(json.loads(done.stdout))
        assert len(set((tmp_path / "processes").read_text().split())) == (1 if where == "true" else 2)
    assert evaluated[0] == evaluated[1]
    done = dstune(tmp_path, "evaluate", "outside", "--json", "--split", "test", "launch.in_process=true")
    assert done.returncode == 2
    assert len(json.loads(done.stdout)["error"]["problems"]) == 1
    assert "there are no test rows" not in done.stderr


def dstune(folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"DSTUNE_CACHE": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "dstune", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("launch", "fix"), [({"processes": 2}, "launch.processes=1"), ({}, "launch.processes=1")])
def test_more_than_one_rank_is_refused(launch, fix):
    config = replace(run_config(), launch=LocalConfig(in_process=True, **launch))
    [problem] = [problem for problem in find_problems(config) if problem.where == "launch.in_process"]
    assert problem.fix == fix


def test_restarts_are_refused():
    config = replace(run_config(), launch=LocalConfig(in_process=True, processes=1, restarts=2))
    [problem] = [problem for problem in find_problems(config) if problem.where == "launch.in_process"]
    assert problem.fix == "launch.restarts=0"


FAILING = """
import dstune

@dstune.callback
class Fails(dstune.Callback):
    name = "fails"

    def on_step_begin(self, run, step):
        if step.number == 2:
            raise RuntimeError("as planned")
"""
CAUGHT = """
import sys, threading
import dstune
try:
    dstune.train(*sys.argv[1:])
except Exception as error:
    print("caught", error)
print(*sorted(thread.name for thread in threading.enumerate()), sep="\\n")
"""


def test_a_run_that_fails_leaves_no_thread_behind(tmp_path: Path):
    """Its watchdog would end the process half an hour later."""
    save_decoder(tmp_path / "model")
    write_dialogues(tmp_path / "rows.jsonl", 20)
    (tmp_path / "own.py").write_text(FAILING)
    settings = [f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'rows.jsonl'}", "data.max_length=64"]
    settings += ["trainer.max_steps=3", "trainer.micro_batch_size=2", "trainer.global_batch_size=4", "run.dir=run"]
    settings += ["launch.processes=1", "launch.in_process=true", "plugins=[./own.py]", "trainer.callbacks=[fails]"]
    env = os.environ | {"DSTUNE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CAUGHT, *settings]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert "caught" in done.stdout and "as planned" in done.stdout + done.stderr, done.stdout + done.stderr
    left = done.stdout.splitlines()[done.stdout.splitlines().index("MainThread") :]
    assert not {"watchdog", "peak-memory"} & set(left), left


REFUSES = """
import dstune

@dstune.callback
class Refuses(dstune.Callback):
    name = "refuses"

    def __init__(self, low: int = 1):
        if low > 2:
            raise ValueError("low is above 2")
"""
SEVERAL = """
import sys
import dstune
run = dstune.train(*sys.argv[1:])
loss = run.evaluate(split="train")["metrics"]["loss"]
again = run.resume("trainer.max_steps=4")
print("trained", again.result["steps"], loss > 0)
try:
    dstune.train(*sys.argv[1:-1], "run.dir=other", "trainer.callbacks=[{refuses: {low: 3}}]")
except dstune.UserError as error:
    print("refused", [(problem.where, problem.reason) for problem in error.problems])
"""


def test_runs_follow_each_other_in_one_process(tmp_path: Path):
    save_decoder(tmp_path / "model")
    write_dialogues(tmp_path / "rows.jsonl", 20)
    (tmp_path / "own.py").write_text(REFUSES)
    settings = [f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'rows.jsonl'}", "data.max_length=64"]
    settings += [
        "trainer.max_steps=3",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=4",
        "plugins=[./own.py]",
    ]
    settings += ["launch.processes=1", "launch.in_process=true", "run.dir=run"]
    env = os.environ | {"DSTUNE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SEVERAL, *settings]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained 4 True" in done.stdout, done.stdout
    assert "refused [(" in done.stdout and "low is above 2" in done.stdout, done.stdout
