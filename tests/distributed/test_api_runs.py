"""`dstune.train` in a process of its own and inside torchrun: train, look, predict, resume, export."""

from __future__ import annotations

import sys

import pytest
from support.command import Commands
from support.tiny import save_encoder

SETTINGS = [
    "model.path=model",
    "task=classification",
    "zero=stage2",
    "data.max_length=32",
    "evaluate.every=0",
    "checkpoint.every=0",
    "data.split.validation=0.2",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=8",
    "optimizer.lr=1e-3",
]

ALONE = f"""
import json, os, signal, threading, time, dstune
rows = [{{"text": f"w{{i % 7}} w{{i % 11}}", "label": "odd" if i % 2 else "even"}} for i in range(60)]
settings = {SETTINGS} + ["launch.processes=2"]
run = dstune.train(*settings, "trainer.max_steps=4", train=rows)
assert run.status == run.result["status"] == "completed", run
assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2, 3, 4]
assert (run.dir / "data" / "train.jsonl").is_file() and (run.dir / "report.html").is_file()
first = run.predict(["w1 w2", {{"text": "w3"}}], probabilities=True)
assert [set(answer["probabilities"]) for answer in first] == [{{"odd", "even"}}] * 2
exported = run.export("out")
assert dstune.predict(exported, ["w1 w2"])[0]["predicted"] == first[0]["predicted"]
longer = run.resume("trainer.max_steps=6", progress=False)
assert longer.dir == run.dir and longer.result["steps"] == 6
assert run.predict(["w1 w2"])[0]["probability"] != first[0]["probability"]  # the weights have changed, and were read again
assert set(run.evaluate()["metrics"]) >= {{"loss", "accuracy"}}
try:
    dstune.train(*settings, train=[row | {{"label": None}} for row in rows])
except dstune.UserError as error:
    assert "train.jsonl" in error.problems[0].where, error
else:
    raise AssertionError("rows without labels were trained on")
assert len(os.listdir("runs/run")) == 1  # the refused run has left nothing behind

# An interrupt makes the ranks save, and the run can be continued.
def interrupt():
    while not list(dstune.load_run("slow").metrics):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
def wait():
    while not os.path.exists("slow/run.yaml"):
        time.sleep(0.1)
    interrupt()
threading.Thread(target=wait, daemon=True).start()
try:
    dstune.train(*settings, "trainer.max_steps=100000", "run.dir=slow", "evaluate.at_start=false", train=rows, progress=False)
except dstune.Preempted as error:
    assert "resume() continues the run" in str(error), error
else:
    raise AssertionError("an interrupted run has ended as if it were done")
assert dstune.load_run("slow").status == "preempted"
print("all is well")
"""

INSIDE = f"""
import os, sys, dstune
rows = [{{"text": f"w{{i % 7}} w{{i % 11}}", "label": "odd" if i % 2 else "even"}} for i in range(60)]
try:
    dstune.train(*{SETTINGS}, "trainer.max_stepz=2", train=rows)
except dstune.UserError as error:
    sys.stdout.write(f"rank {{os.environ['RANK']}} problem {{error.problems[0].where}}\\n")  # one write: ranks share the pipe
"""

RANKS = f"""
import os, sys, dstune
rows = [{{"text": f"w{{i % 7}} w{{i % 11}}", "label": "odd" if i % 2 else "even"}} for i in range(60)]
run = dstune.train(*{SETTINGS}, "trainer.max_steps=2", train=rows)
result = f"{{run.result['world_size']}} {{run.result['steps']}} {{run.dir}}"
sys.stdout.write(f"rank {{os.environ['RANK']}} of {{result}}\\n")  # one write: ranks share the pipe
"""


@pytest.fixture
def workplace(tmp_path) -> Commands:
    save_encoder(tmp_path / "model")
    return Commands(tmp_path)


@pytest.mark.timeout(900)
def test_a_run_from_python(workplace):
    (workplace.folder / "program.py").write_text(ALONE)
    done = workplace.run(program=(sys.executable, "program.py"), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all is well\n")
    assert "step 4/4" in done.stdout


@pytest.mark.parametrize(("program", "words"), [(RANKS, ["of 2 2 runs/run/"]), (INSIDE, ["problem trainer.max_stepz"])])
def test_every_rank_of_a_launcher_of_ones_own_calls_train(workplace, program, words):
    (workplace.folder / "program.py").write_text(program)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "program.py")
    done = workplace.run(program=torchrun, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"rank {rank} ")]
        assert all(word in line for word in words)
