"""What users get wrong: each ends with exit code 2 and one message that names key or file and line; never a traceback.

Every case goes through the real command line; those about rows are found by a rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.command import Commands
from support.tiny import save_decoder, save_encoder, save_xlnet, write_dialogues, write_labelled

GOOD = {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("bad")
    save_decoder(folder / "model")
    write_dialogues(folder / "good.jsonl", 30)
    write_labelled(folder / "labelled.jsonl", 30)
    (folder / "no-weights").mkdir()
    (folder / "empty.jsonl").write_text("")

    def rows(name: str, *lines: object) -> None:
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / name).write_text("\n".join(text) + "\n")

    rows("broken.jsonl", GOOD, '{"messages": [{"role": "user"', GOOD)
    rows("role.jsonl", GOOD, {"messages": [{"role": "robot", "content": "w1"}, GOOD["messages"][1]]})
    rows("order.jsonl", GOOD, GOOD, {"messages": list(reversed(GOOD["messages"]))})
    rows("nobody.jsonl", GOOD, {"messages": GOOD["messages"][:1]})
    rows("column.jsonl", {"question": "w1", "reply": "w2"})
    rows("unseen.jsonl", {"text": "w1 w2", "label": "left"}, {"text": "w1", "label": "upwards"})
    template = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    template.pop("chat_template", None)
    save_decoder(folder / "silent")
    (folder / "silent" / "tokenizer_config.json").write_text(json.dumps(template))
    (folder / "silent" / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "not-a-run").mkdir()
    save_encoder(folder / "encoder")
    save_xlnet(folder / "xlnet")
    return Commands(folder)


BASE = [
    "model.path=model",
    "data.train=good.jsonl",
    "data.max_length=64",
    "evaluate.every=0",
    "checkpoint.every=0",
    "launch.processes=1",
    "trainer.max_steps=1",
]
CLASSES = ["task=classification", "data.packing=false", "data.train=labelled.jsonl"]

CASES = {
    "unknown key": (["optimizer.learning_rate=1"], ["optimizer.learning_rate"]),
    "unknown choice": (["method=lorra"], ["method", "lora"]),
    "key of another choice": (["method=full", "method.rank=8"], ["method.rank"]),
    "wrong type": (["trainer.max_steps=many"], ["trainer.max_steps", "many"]),
    "out of range": (["trainer.micro_batch_size=0"], ["trainer.micro_batch_size=0"]),
    "no such model folder": (["model.path=./absent"], ["model.path=./absent"]),
    "folder without a model": (["model.path=no-weights"], ["model.path=no-weights"]),
    "no such data file": (["data.train=absent.jsonl"], ["data.train=absent.jsonl"]),
    "no such run": (["run.resume=not-a-run"], ["run.resume=not-a-run"]),
    "empty file": (["data.train=empty.jsonl"], ["empty.jsonl"]),
    "broken line": (["data.train=broken.jsonl"], ["broken.jsonl:2"]),
    "unknown role": (["data.train=role.jsonl"], ["role.jsonl:2", "robot"]),
    "answer before question": (["data.train=order.jsonl"], ["order.jsonl:3"]),
    "nothing to train on": (["data.train=nobody.jsonl"], ["nobody.jsonl:2"]),
    "missing column": (["data.train=column.jsonl"], ["column.jsonl"]),
    "unseen label": ([*CLASSES, "data.validation=unseen.jsonl"], ["unseen.jsonl:2", "upwards"]),
    "fp16 without a GPU": (["trainer.precision=fp16"], ["trainer.precision=fp16"]),
    "longer than max_length": (["data.max_length=8", "data.train=long.jsonl"], ["data.max_length=8"]),
    "no chat template": (["model.path=silent"], ["model.chat_template"]),
    "encoder as a chat model": (
        ["model.path=encoder"],
        ["model.path=encoder", "bert is an encoder", "task=classification"],
    ),
    "model that reads later tokens": (
        ["model.path=xlnet", "data.packing=false", "model.attention=eager", "data.padding=tolerated"],
        ["model.path=xlnet", "later tokens"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(workplace: Commands, case: str) -> None:
    overrides, named = CASES[case]
    long = {"messages": [{"role": "user", "content": "w1 " * 40}, {"role": "assistant", "content": "w2"}]}
    (workplace.folder / "long.jsonl").write_text(json.dumps(long) + "\n")
    done = workplace.run("train", *BASE, *overrides, f"run.dir=run-{case.replace(' ', '-')}")
    output = done.stderr + done.stdout
    assert done.returncode == 2, output
    assert "Traceback" not in output
    for text in named:
        assert text in done.stderr, done.stderr
    assert done.stderr.count("dstune: ") == 1, done.stderr
    assert not list(workplace.folder.glob("run-*")), "a refused start leaves nothing behind"


def test_several_mistakes_are_reported_together(workplace: Commands) -> None:
    done = workplace.run("train", *BASE, "trainer.micro_batch_size=0", "optimizer.lr=-1", "evaluate.samples=-1")
    assert done.returncode == 2
    for key in ("trainer.micro_batch_size=0", "optimizer.lr=-1", "evaluate.samples=-1"):
        assert key in done.stderr
    assert not (Path(workplace.folder) / "runs").exists()


def test_a_refused_continuation_leaves_the_run_as_it_was(workplace: Commands) -> None:
    """Changed rows are found by the ranks, after the new `run.yaml` was written."""
    rows = workplace.folder / "changing.jsonl"
    write_dialogues(rows, 30)
    run_dir = workplace.folder / "begun"
    begun = workplace.run("train", *BASE, f"data.train={rows}", f"run.dir={run_dir}", "run.export=none")
    assert begun.returncode == 0, begun.stderr
    before = {name: (run_dir / name).read_bytes() for name in ("run.yaml", "result.json", "metrics.jsonl")}
    write_dialogues(rows, 31)
    done = workplace.run("train", str(run_dir), "trainer.max_steps=2")
    assert done.returncode == 2, done.stderr
    assert "the file changed since" in done.stderr
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    status = workplace.run("status", str(run_dir))
    assert "completed" in status.stdout
    never = workplace.run("train", str(run_dir), "trainer.max_steps=2", "run.resume=never")
    assert never.returncode == 2
    assert "run.resume=never" in never.stderr
    epochs = workplace.run("train", str(run_dir), "trainer.epochs=7")
    assert epochs.returncode == 2
    assert "trainer.epochs=7: the run's length was given in optimizer steps" in epochs.stderr


@pytest.mark.ci
def test_an_outer_launch_reports_an_error_of_all_ranks_once(workplace: Commands) -> None:
    """The second line is broken: both ranks find it, and both write to this terminal."""
    program = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dstune")
    run_dir = workplace.folder / "outer"
    overrides = [text for text in BASE if not text.startswith("launch.")]
    done = workplace.run("train", *overrides, "data.train=broken.jsonl", f"run.dir={run_dir}", program=program)
    assert done.returncode != 0
    assert done.stderr.count("broken.jsonl:2") == 1, done.stderr
    assert not run_dir.exists()
