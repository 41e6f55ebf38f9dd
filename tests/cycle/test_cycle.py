"""A cycle from feedback to a challenger, with real trainings of a tiny classifier."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support import warm_start

from dstune.cli import main
from dstune.cycle import training
from dstune.cycle.registry import Registry
from dstune.data.run_rows import read_run_parts
from tests.support.served_runs import save_run
from tests.support.tiny import WORDS, save_decoder, save_encoder, write_dialogues, write_labelled

OVERRIDES = [
    "trainer.max_steps=6",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=8",
    "optimizer.lr=1e-3",
    "launch.processes=1",
    "launch.in_process=true",
    "checkpoint.every=2",
    "run.export=none",
    "evaluate.every=100",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cycled")
    rows = write_labelled(folder / "rows.jsonl", 200)
    save_run(folder / "run", save_encoder(folder / "model"), rows, "task=classification", labels=("left", "right"))
    return folder


@pytest.fixture(autouse=True)
def _warm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training.subprocess, "run", warm_start.run)


def write_feedback(path: Path, count: int, *, first: int = 0, keys: int = 5, labelled: bool = True) -> list[dict]:
    """Requests with an id, a user and a key; the label says which half of the words they prefer."""
    choose = random.Random(first + 7)
    half = len(WORDS) // 2
    rows = []
    for number in range(first, first + count):
        label = choose.choice(["left", "right"])
        words = WORDS[:half] if label == "left" else WORDS[half:]
        text = " ".join(choose.choices(words, k=choose.randint(6, 20)))
        row = {"id": f"r{number}", "key": f"k{number % keys}", "user": f"u{number}", "text": text, "answer": "right"}
        rows.append(row | ({"label": label} if labelled else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_config(folder: Path, base: Path, **changes: object) -> Path:
    content = {
        "run": str(base / "run"), "folder": "cycle", "data": "feedback.jsonl", "least_rows": 20, "hold_out": 0.2,
        "overrides": OVERRIDES, "share": 0.25, "share_per_key": 0.4, "gates": {"margin": 1.0, "bootstrap": 200}, **changes,
    }  # fmt: skip
    path = folder / "cycle.yaml"
    path.write_text(json.dumps(content))
    return path


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "cycle" / "ledger.jsonl").read_text().splitlines()]


def test_from_feedback_to_a_challenger_and_back(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, base)
    write_feedback(tmp_path / "feedback.jsonl", 60, labelled=False)
    assert main(["cycle", str(config)]) == 0
    (line,) = ledger(tmp_path)
    assert (line["step"], line["decision"], line["dropped"]) == ("collect", "nothing", {"without a label": 60})

    feedback = write_feedback(tmp_path / "feedback.jsonl", 60)
    feedback.append(feedback[0] | {"id": "r99", "label": "neither"})
    measured = read_run_parts(base / "run", fix="")[1]["validation"][0][1]
    feedback.append({"id": "leak", "key": "k1", "user": "leaky", **measured})
    (tmp_path / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in feedback))
    assert main(["cycle", str(config), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["decision"], result["current"], result["challenger"]) == ("challenges", "v1", "v3")
    assert result["aliases"] == {"live": {"v1": 0.75, "v3": 0.25}}
    steps = {line["step"]: line for line in ledger(tmp_path) if line["cycle"] == 2}
    assert steps["collect"]["dropped"] == {
        "a label that the model lacks": 1, "shares words with rows that are measured": 1,
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "cycle" / "rows" / "0002.jsonl").read_text().splitlines()]
    held_out = {row["row"]["text"] for row in rows if row["is_held_out"]}
    trained = [
        json.loads(line)["text"] for line in (tmp_path / "cycle/cycles/0002/train.jsonl").read_text().splitlines()
    ]
    assert 3 <= len(held_out) <= 25 and len(trained) == 60 - len(held_out)
    assert held_out.isdisjoint(trained)
    gates = {gate["name"]: gate for gate in steps["judge"]["gates"]}
    assert gates.keys() == {"validation", "new rows"} and gates["new rows"]["rows"] == len(held_out)
    assert steps["train"]["old"] == 140 and steps["train"]["steps"] == 6
    for kept in ("rows/0002.jsonl", "cycles/0002/train.jsonl", "ledger.jsonl"):
        assert (tmp_path / "cycle" / kept).stat().st_mode & 0o077 == 0

    assert main(["cycle", str(config)]) == 0  # a challenger waits: nothing is trained
    assert ledger(tmp_path)[-1]["decision"] == "waiting"
    assert main(["cycle", str(config), "promote", "--by", "ann", "--reason", "read 20 answers"]) == 0
    assert main(["cycle", str(config), "rollback", "--by", "ann"]) == 0
    assert [(line["step"], line["decision"], line["by"]) for line in ledger(tmp_path)[-2:]] == [
        ("promote", "v3", "ann"),
        ("rollback", "v1", "ann"),
    ]


def test_a_deleted_row_is_gone_from_the_next_version(base: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, base)
    first = write_feedback(tmp_path / "feedback.jsonl", 60)
    assert main(["cycle", str(config)]) == 0
    assert main(["cycle", str(config), "promote"]) == 0
    trained = [
        json.loads(line)["text"] for line in (tmp_path / "cycle/cycles/0001/train.jsonl").read_text().splitlines()
    ]
    victim = next(row for row in first if row["text"] in trained)
    more = write_feedback(tmp_path / "more.jsonl", 60, first=100)
    (tmp_path / "feedback.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*first, *more] if row["id"] != victim["id"])
    )
    assert main(["cycle", str(config)]) == 0
    collected = next(line for line in ledger(tmp_path) if line["cycle"] == 2 and line["step"] == "collect")
    assert collected["forgotten"] == 1
    version = Registry.read(tmp_path / "cycle").versions["v3"]
    assert version["parent"] == "v1"  # v2 was trained on the row
    rows = [json.loads(line)["text"] for line in (tmp_path / "cycle/cycles/0002/train.jsonl").read_text().splitlines()]
    assert victim["text"] not in rows and set(trained) - {victim["text"]} < set(rows)
    for file in (tmp_path / "cycle").rglob("*.jsonl"):
        assert victim["text"] not in file.read_text(), file


@pytest.mark.slow
def test_a_chat_model_learns_corrections_and_accepted_answers(tmp_path: Path) -> None:
    rows = write_dialogues(tmp_path / "dialogues.jsonl", 60)
    save_run(tmp_path / "run", save_decoder(tmp_path / "model"), rows, "task=chat", "method=full", scale=0.02)
    choose = random.Random(3)
    said = []
    for number in range(80):
        asked = [{"role": "user", "content": " ".join(choose.choices(WORDS, k=6))}]
        word = {"correction": " ".join(choose.choices(WORDS, k=4))} if number % 2 else {"rating": number % 4 / 2}
        said.append(
            {
                "id": f"r{number}",
                "key": f"k{number % 5}",
                "user": f"u{number}",
                "messages": asked,
                "answer": "w1",
                **word,
            }
        )
    (tmp_path / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    settings = {"overrides": [*OVERRIDES, "data.max_length=64"], "ewc": 1.0, "l2sp": 0.1}
    config = write_config(
        tmp_path, tmp_path, gates={"margin": 10, "swaps": [["w1", "w2"]], "bootstrap": 200}, **settings
    )
    assert main(["cycle", str(config)]) == 0
    steps = {line["step"]: line for line in ledger(tmp_path)}
    assert steps["collect"]["dropped"] == {"without a correction or an accepted answer": 20}
    trained = [json.loads(line) for line in (tmp_path / "cycle/cycles/0001/train.jsonl").read_text().splitlines()]
    answers = {row["messages"][-1]["content"] for row in trained}
    assert answers <= {row.get("correction", "w1") for row in said} and len(answers) > 10
    gates = {gate["name"]: gate for gate in steps["judge"]["gates"]}
    assert gates["new rows"]["candidate"] > gates["new rows"]["current"]  # log-probability of what people said
    assert steps["register"]["decision"] == "challenges"
