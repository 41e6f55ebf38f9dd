"""Runs of transformers' Trainer and of TRL with DeepSpeed go on in dstune, on other ranks and stages, with the same curve."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.command import Commands, metrics
from support.ranks import ROOT, run_ranks
from support.tiny import WORDS, save_decoder
from support.trainer_checkpoints import write_rows

PROGRAM = ROOT / "tests" / "support" / "trainer_ranks.py"
PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
ROWS, STEP, STEPS = 205, 50, 100
TOKENS = ["task=causal_lm", "data.format=tokens", "data.train=rows.jsonl", "data.tokenizer=model"]


def deepspeed(stage: int) -> dict[str, Any]:
    """Return the file that the Trainer's documentation gives, for a stage."""
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    on_cpu = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {**sizes, **on_cpu, "gradient_clipping": "auto", "zero_optimization": {"stage": stage}}


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": STEP,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "warmup_steps": 5,
    "seed": 7,
}
CASES: dict[str, dict[str, Any]] = {
    "full-2": {"deepspeed": deepspeed(2), "arguments": {**SETTINGS, "lr_scheduler_type": "cosine"}},
    # The last step of an epoch is short, and the rows have a seed of their own.
    "full-3": {
        "deepspeed": deepspeed(3),
        "arguments": {**SETTINGS, "lr_scheduler_type": "linear", "data_seed": 11, "gradient_accumulation_steps": 3},
    },
    "trl-lora": {
        "deepspeed": deepspeed(3),
        "arguments": {**SETTINGS, "max_length": 256, "bf16": False, "lr_scheduler_type": "cosine"},
        "trl": True,
        "lora": LORA,
        "rows": "chats.jsonl",
    },
}
MORE: dict[str, list[str]] = {
    "full-2": TOKENS,
    "full-3": [*TOKENS, "model.path=model"],
    "trl-lora": ["data.train=chats.jsonl"],
}


def write_chats(path: Path) -> None:
    randoms = random.Random(1)
    with path.open("w") as stream:
        for number in range(ROWS):
            first = [WORDS[number % 96], WORDS[number // 96]]
            turns = [
                {
                    "role": role,
                    "content": " ".join(first * (not turn) + randoms.choices(WORDS, k=randoms.randrange(2, 7))),
                }
                for turn, role in enumerate(["user", "assistant"] * randoms.randrange(1, 3))
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")


class Undisturbed:
    """A run of the other tool that was not killed, and its folder."""

    def __init__(self, folder: Path, case: dict[str, Any]):
        self.folder = folder
        save_decoder(folder / "model")
        write_rows(folder / "rows.jsonl", ROWS)
        write_chats(folder / "chats.jsonl")
        argument = {"out": str(folder), "model": str(folder / "model"), **case}
        run_ranks(PROGRAM, 2, {**argument, "rows": str(folder / case.get("rows", "rows.jsonl"))})
        (folder / "trainer" / f"checkpoint-{STEP}").rename(folder / f"checkpoint-{STEP}")
        state = json.loads((folder / "trainer" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        self.log = {entry["step"]: entry for entry in state["log_history"] if "loss" in entry}
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
        # As accelerate hands them out: a micro-batch to each rank in turn.
        self.rows = {int(step): sorted(row for of_rank in ranks for row in of_rank[step]["rows"]) for step in ranks[0]}
        shutil.rmtree(folder / "trainer")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    runs: dict[str, Undisturbed] = {}

    def run(name: str) -> Undisturbed:
        if name not in runs:
            runs[name] = Undisturbed(tmp_path_factory.mktemp(name), CASES[name])
        return runs[name]

    return run


LAYOUTS = [
    ("full-2", 1, 3),
    pytest.param("full-2", 2, 2, marks=pytest.mark.slow),
    ("full-2", 3, 1),
    pytest.param("full-3", 1, 0, marks=pytest.mark.slow),
    ("full-3", 2, 2),
    pytest.param("full-3", 3, 3, marks=pytest.mark.slow),
    pytest.param("trl-lora", 1, 2, marks=pytest.mark.slow),
    pytest.param("trl-lora", 2, 3, marks=pytest.mark.slow),
    ("trl-lora", 3, 2),
]


@pytest.mark.parametrize(("name", "ranks", "stage"), LAYOUTS)
def test_the_curve_goes_on(undisturbed, name, ranks, stage):
    theirs = undisturbed(name)
    commands, run = Commands(theirs.folder), f"run-{name}-{ranks}"
    imported = commands.run("import", f"checkpoint-{STEP}", "--output", run, *MORE[name])
    assert imported.returncode == 0, imported.stderr
    assert "losses will differ" not in imported.stdout
    trained = commands.run("train", run, f"launch.processes={ranks}", f"zero.stage={stage}")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    rows = [row for row in metrics(theirs.folder / run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(STEP + 1, STEPS + 1))
    for row in rows:
        entry = theirs.log[row["step"]]
        assert row["loss"] == pytest.approx(entry["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-3)
        assert row["lr"] == pytest.approx(entry["learning_rate"], rel=1e-6)
        assert row["epoch"] == pytest.approx(
            entry["epoch"], abs=0.1
        )  # theirs counts micro-batches, of a short last step too
    lines = (theirs.folder / run / "order.jsonl").read_text().splitlines()
    order = [sorted(json.loads(line)["rows"]) for line in lines[:STEPS]]
    assert order == [theirs.rows[step] for step in range(1, STEPS + 1)]


def test_the_commands_of_the_page(undisturbed):
    theirs = undisturbed("trl-lora")
    commands = Commands(theirs.folder)
    section = PAGE.split("## Continue another tool's half-finished run")[1].split("\n## ")[0]
    lines = [
        shlex.split(line)
        for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines()
    ]
    assert [words[:2] for words in lines] == [["dstune", "import"], ["dstune", "train"]]
    for _, *words in lines:
        result = commands.run(*words)
        assert result.returncode == 0, result.stdout + result.stderr
    assert len([row for row in metrics(theirs.folder / "runs" / "mine") if "loss" in row]) == STEPS - STEP


def test_weights_that_the_model_does_not_train_are_not_dropped(undisturbed):
    """All weights were trained there, and the command freezes some of them."""
    commands = Commands(undisturbed("full-2").folder)
    freezes = ["method=freeze", "method.first_layers=1"]
    assert commands.run("import", f"checkpoint-{STEP}", "--output", "run-fewer", *TOKENS, *freezes).returncode == 0
    trained = commands.run("train", "run-fewer", "launch.processes=1")
    assert trained.returncode == 2
    message = trained.stdout + trained.stderr
    assert re.search(r"step-00000050 has other trained weights than the model: .* is only in the checkpoint", message)
