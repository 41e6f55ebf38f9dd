"""Runs on rows with images from the command line: what is shown, trained, answered, exported and evaluated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dstune.cli import main
from tests.support.command import Commands, exact
from tests.support.sight import save, write_rows

SIZES = ((32, 32), (60, 40))
KILLER = """
import os, signal
from pathlib import Path
import dstune

@dstune.callback
class Killer(dstune.Callback):
    name = "killer"

    def on_step_begin(self, run, step):
        order = Path(run.run_dir).parent / "order"
        if os.environ["RANK"] == "1" and order.exists() and step.number == int(order.read_text()):
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save("qwen2_vl", folder / "model")
    write_rows(folder / "data", 12, images=lambda row: row % 3, sizes=SIZES)
    return folder


@pytest.fixture(autouse=True)
def cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(place / "cache"))


def words(place: Path) -> list[str]:
    return ["task=chat", f"model.path={place / 'model'}", f"data.train={place / 'data' / 'rows.jsonl'}"]


def test_rows_are_shown_with_their_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", *words(place), "--rows", "100"]) == 0
    shown = capsys.readouterr().out
    assert "image 1: " in shown and "60 x 40 pixels" in shown and "<|image_pad|>" in shown
    page = place / "rows.html"
    assert main(["data", "show", *words(place), "--rows", "100", "--html", str(page)]) == 0
    assert page.read_text().count('<img src="data:image/jpeg;base64,') == shown.count(" pixels")
    assert main(["data", "show", *words(place), "--row", f"{place / 'data' / 'rows.jsonl'}:3"]) == 0
    assert "image 2: " in capsys.readouterr().out


def as_transformers_answers(folder: Path, rows: list[dict[str, Any]], data: Path) -> list[str]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, backend="torchvision")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    answers = []
    for row in rows:
        text = processor.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        images = [Image.open(data / name).convert("RGB") for name in row["images"]]
        inputs = processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=4)
        answer = written[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
    return answers


def test_a_run_trains_answers_and_exports(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "run"
    command = [
        *words(place),
        "method=full",
        "optimizer.lr=0.01",
        "data.max_length=256",
        "data.split.validation=0.3",
        "trainer.max_steps=2",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=2",
        "trainer.precision=fp32",
        "zero=stage2",
        "evaluate.samples=2",
        "evaluate.max_new_tokens=4",
        "launch.processes=1",
        "tracking.wandb.mode=disabled",
        f"run.dir={run}",
    ]
    assert main(["train", *command]) == 0
    export = run / "export"
    assert (export / "processor_config.json").read_bytes() == (place / "model" / "processor_config.json").read_bytes()
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed"
    capsys.readouterr()

    data = place / "data"
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    asked = [{"messages": row["messages"][:-1], "images": row["images"]} for row in rows[:6]]
    (data / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    given = ["--input", str(data / "asked.jsonl"), "--max-new-tokens", "5", "--json"]
    assert main(["generate", str(export), *given]) == 0
    answers = [json.loads(line)["answer"].strip() for line in capsys.readouterr().out.splitlines()]
    assert answers == as_transformers_answers(export, asked, data)

    assert main(["evaluate", str(run), "launch.processes=1"]) == 0
    assert "loss" in capsys.readouterr().out


def test_a_trained_tower_stays_where_it_is_in_a_step_without_images(place: Path) -> None:
    """DeepSpeed's ZeRO 3 keeps the gradient of the step before for a parameter that gets none."""
    folder = place / "few"
    rows = write_rows(folder, 8, images=lambda row: int(row == 0))
    exports = []
    for stage in (0, 3):
        run = folder / f"run{stage}"
        given = ["task=chat", f"model.path={place / 'model'}", f"data.train={rows}", "data.split.validation=0"]
        settings = ["method=full", "model.train_vision=true", "optimizer=sgd", "optimizer.lr=0.1", "schedule=constant"]
        settings += [f"zero=stage{stage}", "optimizer.momentum=0", "optimizer.weight_decay=0", "trainer.seed=0"]
        batches = [
            "data.packing=false",
            "trainer.max_steps=8",
            "trainer.global_batch_size=2",
            "trainer.micro_batch_size=1",
        ]
        machine = ["trainer.precision=fp32", "launch.processes=1", "tracking.wandb.mode=disabled", f"run.dir={run}"]
        assert main(["train", *given, *settings, *batches, *machine]) == 0
        exports.append(load_file(run / "export" / "model.safetensors"))
    gathered, partitioned = exports
    assert any("visual" in name for name in gathered)
    for name, weight in gathered.items():
        assert torch.allclose(weight, partitioned[name], atol=1e-5), name


def test_a_run_that_is_killed_and_continued_ends_with_the_same_bits(place: Path) -> None:
    """SIGKILL to one of two ranks, a step behind a save; the tower is trained and partitioned, and not every micro-batch has an
    image."""
    commands = Commands(place)
    (place / "killer.py").write_text(KILLER)
    given = ["task=chat", "model.path=model", "data.train=data/rows.jsonl", "data.split.validation=0"]
    settings = ["method=full", "model.train_vision=true", "optimizer.lr=0.01", "zero=stage3", "data.max_length=256"]
    batches = ["trainer.micro_batch_size=1", "trainer.global_batch_size=3", "trainer.max_steps=5", "checkpoint.every=2"]
    machine = ["trainer.precision=fp32", "launch.processes=2", "tracking.wandb.mode=disabled", "evaluate.samples=0"]
    machine += ["plugins=[./killer.py]", "trainer.callbacks=[killer]", "zero.param_persistence_threshold=0"]
    words = [*given, *settings, *batches, *machine]
    done = commands.run("train", *words, "run.dir=undisturbed")
    assert done.returncode == 0, done.stderr
    (place / "order").write_text("4")
    assert commands.run("train", *words, "run.dir=killed").returncode == 1
    assert not (place / "order").exists(), "at the step that was meant"
    done = commands.run("train", *words, "run.dir=killed")
    assert done.returncode == 0, done.stderr
    assert exact(place / "killed") == exact(place / "undisturbed")
    whole, killed = (place / run / "export" / "model.safetensors" for run in ("undisturbed", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


def test_preferences_of_other_tools(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA-Factory's ranking, and answers as texts: trained, shown, exported and evaluated."""
    folder = place / "preferences"
    write_rows(folder, 8)
    turns = [{"from": "human", "value": "<image>w1 w2"}]
    answers = {name: {"from": "gpt", "value": value} for name, value in (("chosen", "w3"), ("rejected", "w4 w5"))}
    ranked = [{"conversations": turns, **answers, "images": [f"image{row}.png"]} for row in range(4)]
    plain = [{"prompt": "w1 w6", "chosen": "w7", "rejected": "w8", "image": f"image{row}.png"} for row in range(4, 8)]
    for name, rows in (("ranked", ranked), ("plain", plain)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["task=preference", f"model.path={place / 'model'}", f"data.train={folder / 'ranked.jsonl'}"]
    given += [f"data.validation={folder / 'plain.jsonl'}", "data.max_length=128"]
    assert main(["data", "show", *given, "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "image 1: " in shown and "<|image_pad|>" in shown
    run = folder / "run"
    machine = ["trainer.precision=fp32", "launch.processes=1", "tracking.wandb.mode=disabled", f"run.dir={run}"]
    steps = ["trainer.max_steps=3", "trainer.global_batch_size=4", "trainer.micro_batch_size=2", "evaluate.samples=1"]
    steps += ["optimizer.lr=0.05", "schedule=constant", "evaluate.every=3"]
    assert main(["train", *given, "method=lora", "zero=stage2", *steps, *machine]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row["eval/loss"] for row in rows if "eval/loss" in row]
    capsys.readouterr()
    assert main(["evaluate", str(run), "launch.processes=1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert abs(measured[-1] - math.log(2)) > 1e-2, "the model is another one than its reference"
    assert result["metrics"]["loss"] == pytest.approx(measured[-1], rel=1e-4)


def test_bad_images_are_counted_with_their_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "bad"
    rows = write_rows(folder, 4)
    whole = (folder / "image1.png").read_bytes()
    (folder / "image1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "image3.png").unlink()
    given = ["task=chat", f"model.path={place / 'model'}", f"data.train={rows}", "--rows", "1"]
    assert main(["data", "show", *given]) == 2
    error = capsys.readouterr().err
    assert f"{rows}:4: image 1 ('image3.png') is not there; data.image_folder" in error
    assert main(["data", "show", *given, "data.on_bad_row=skip"]) == 0
    assert "bad" in capsys.readouterr().out
    long = ["task=chat", f"model.path={place / 'model'}", f"data.train={place / 'data' / 'rows.jsonl'}"]
    assert main(["data", "show", *long, "data.max_length=8", "--rows", "1"]) == 2
    assert "cuts through an image of tokens" in capsys.readouterr().err
