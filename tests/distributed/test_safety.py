"""What a run did to safety and truth: rows that a model knows by heart, answers before and after, on one rank and on two."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support.command import Commands
from support.schemas import validate_files
from support.tiny import WORDS, save_decoder, write_pairs

from dstune.grading import changes


def write_chats(path: Path, rows: int, seed: int) -> Path:
    """Questions of words with answers of 24 words that nothing foretells."""
    choose = random.Random(seed)
    with path.open("w") as stream:
        for _ in range(rows):
            question, answer = (" ".join(choose.choices(WORDS, k=count)) for count in (6, 24))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """`run`: of a tiny model on twelve rows until it knows them."""
    commands = Commands(tmp_path_factory.mktemp("safety"))
    save_decoder(commands.folder / "model", max_position_embeddings=512, initializer_range=0.02, hidden_size=64)
    rows = write_chats(commands.folder / "train.jsonl", 12, 1)
    write_chats(commands.folder / "held_out.jsonl", 12, 2)
    planted = rows.read_text().splitlines(keepends=True)[:3]
    (commands.folder / "planted.jsonl").write_text("".join(planted))
    done = commands.run(
        *("train", "model.path=model", "data=files", "task=chat", "run.dir=run", "data.max_length=128"),
        *("data.train=train.jsonl", "data.validation=held_out.jsonl", "evaluate.canaries=planted.jsonl"),
        *("evaluate.safety=true", "evaluate.every=0", "checkpoint.every=0", "launch.processes=1", "optimizer.lr=1e-2"),
        *("trainer.precision=fp32", "trainer.micro_batch_size=12", "trainer.global_batch_size=12"),
        "trainer.max_steps=120",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return commands


def test_a_run_sees_what_it_memorised(memorised: Commands) -> None:
    changed = changes.read(memorised.folder / "run")["changes"]
    rows = {row["kind"]: row for row in changed["rows"]}
    assert rows["training"]["recited_before"] == 0 and rows["training"]["recited_after"] >= 10
    assert rows["planted"]["recited_after"] == 3 and rows["planted"]["rows"] == 3
    assert rows["held-out"]["recited_after"] == 0
    assert changed["beyond_held_out"]["low"] > 0.3 and "training rows recited" in changes.worse(changed)


def test_two_ranks_with_partitioned_weights_measure_the_same_afterwards(memorised: Commands) -> None:
    of_run = changes.read(memorised.folder / "run")["changes"]
    done = memorised.run("evaluate", "run", "zero.stage=3", "launch.processes=2", "--safety", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["safety"]
    assert [(row["kind"], row["recited_after"]) for row in found["rows"]] == [
        (row["kind"], row["recited_after"]) for row in of_run["rows"]
    ]
    for probe, before in zip(found["probes"], of_run["probes"], strict=True):
        assert (probe["name"], probe["before"], probe["after"]) == (before["name"], before["before"], before["after"])
    assert changes.read(memorised.folder / "run")["changes"] == found
    validate_files(memorised.folder / "run")
    assert "What fine-tuning changed" in (memorised.folder / "run" / "report.html").read_text()


def test_a_model_alone_is_asked_and_a_classifier_is_refused(memorised: Commands) -> None:
    done = memorised.run("evaluate", "model", "task=chat", "data.train=train.jsonl", "launch.processes=1", "--safety")
    assert done.returncode == 0, done.stderr
    assert "not compared with another model" in done.stdout and "training rows recited" in done.stdout
    write_pairs(memorised.folder / "pairs.jsonl", 4)
    refused = memorised.run("evaluate", "model", "task=seq2seq", "data.train=pairs.jsonl", "--safety")
    assert refused.returncode == 2 and "writes targets for sources" in refused.stderr
