"""Utilisation and profile of whole runs on two ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from support.command import Commands, exact, metrics, result, wait_until
from support.tiny import WORDS, save_decoder

QUESTION, ANSWER = 7, 5
LENGTH = (1 + 1 + 1 + QUESTION + 1 + 1) + (1 + 1 + 1 + ANSWER + 1 + 1)
"""Tokens of a dialogue in ChatML: beginning, role and line end, words, end and line end."""
TARGETS = ANSWER + 1
"""The assistant's words and the end of the turn."""

ROWS, PEAK = 8, 1e9

# Queries and outputs, keys and values, gate, up and down of each of two layers; the vocabulary of 105.
WEIGHTS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
FLOPS = ROWS * (6 * WEIGHTS * LENGTH + 12 * 32 * 2 * LENGTH**2 + 6 * 105 * 32 * TARGETS)

pytestmark = pytest.mark.cold  # the time of imports is looked at


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    folder = tmp_path_factory.mktemp("utilization")
    save_decoder(folder / "model")
    with (folder / "dialogues.jsonl").open("w") as stream:
        for row in range(96):
            question, answer = (
                " ".join(WORDS[(row * 7 + word * step) % len(WORDS)] for word in range(count))
                for count, step in ((QUESTION, 5), (ANSWER, 11))
            )
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    speed = {"flops": PEAK, "saved": 1e9, "logits": 1e9, "weights": 1e9, "link": 1e9}
    measured = {"device": "CPU", "ranks": 2, "threads": 1, "speeds": {"4": speed}}
    (folder / "cache").mkdir()
    (folder / "cache" / "calibration-2.json").write_text(json.dumps({"2": measured}))
    return Commands(folder)


def overrides(name: str, *further: str) -> list[str]:
    return [
        "model.path=model",
        "model.config_overrides={attention_dropout:0.1}",
        "data.train=dialogues.jsonl",
        "data.max_length=64",
        "data.packing=false",
        "trainer.precision=fp32",
        "optimizer.lr=1e-3",
        "zero=stage2",
        "trainer.micro_batch_size=2",
        f"trainer.global_batch_size={ROWS}",
        "trainer.max_steps=8",
        "evaluate.every=4",
        "checkpoint.every=5",
        "launch.processes=2",
        f"run.dir={name}",
        *further,
    ]


@pytest.fixture(scope="module")
def plain(workplace: Commands) -> Path:
    done = workplace.run("train", *overrides("plain"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of the devices' peak" in done.stdout
    return workplace.folder / "plain"


def steps_of(run_dir: Path) -> list[dict]:
    return [row for row in metrics(run_dir) if "loss" in row]


def test_utilization_is_what_the_rows_need_over_what_the_ranks_can(plain: Path) -> None:
    for row in steps_of(plain):
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(ROWS * LENGTH)
        assert row["positions_per_second"] * row["step_seconds"] == pytest.approx(ROWS * (LENGTH + -LENGTH % 8))
        assert row["targets_per_second"] * row["step_seconds"] == pytest.approx(ROWS * TARGETS)
        assert row["utilization"] * row["step_seconds"] * 2 * PEAK == pytest.approx(FLOPS)
    seconds = sum(row["step_seconds"] for row in steps_of(plain)[2:])
    assert result(plain)["utilization"] == pytest.approx(6 * FLOPS / (seconds * 2 * PEAK), rel=1e-3)


@pytest.mark.ci
def test_a_profile_changes_nothing_and_takes_the_steps_that_were_requested(workplace: Commands, plain: Path) -> None:
    done = workplace.run("train", *overrides("profiled", "trainer.profile_steps=4"))
    assert done.returncode == 0, done.stdout + done.stderr
    profiled = workplace.folder / "profiled"
    assert exact(profiled) == exact(plain)
    weights = Path("export", "model.safetensors")
    assert (profiled / weights).read_bytes() == (plain / weights).read_bytes()
    # Evaluated after step 4, saved after step 5.
    stretches = ("3-4", "5-5", "6-6")
    names = {
        f"steps-{steps}.rank-{rank}.{kind}" for steps in stretches for rank in (0, 1) for kind in ("json.gz", "txt")
    }
    assert {file.name for file in (profiled / "profile").iterdir()} == names
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("profile of")] == [
        "profile of steps 3 to 4",
        "profile of step 5",
        "profile of step 6",
    ]
    # Step 7 may wait for a rank that still writes; only the last one counts.
    last = steps_of(profiled)[-1]
    assert result(profiled)["utilization"] == pytest.approx(FLOPS / (last["step_seconds"] * 2 * PEAK), rel=1e-3)


def test_a_run_that_is_stopped_while_it_is_profiled_leaves_its_profile(workplace: Commands) -> None:
    several = ("trainer.profile_steps=100", "trainer.max_steps=100", "evaluate.every=0", "checkpoint.every=0")
    command = workplace.start("train", *overrides("stopped", *several))
    run_dir = workplace.folder / "stopped"
    wait_until(lambda: len(metrics(run_dir)) > 6)
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=60) == 75, workplace.log
    last = result(run_dir)["steps"]
    assert 6 <= last < 100
    for rank in (0, 1):
        assert (run_dir / "profile" / f"steps-3-{last}.rank-{rank}.json.gz").stat().st_size > 1000
    assert result(run_dir)["tokens_per_second"] is None, "all steps but the first two were profiled"
    assert "utilization" not in result(run_dir)


def test_where_the_time_to_the_first_step_went(plain: Path) -> None:
    seconds = result(plain)["start_seconds"]
    assert list(seconds) == [
        *("command", "imports", "data", "proof", "model", "engine", "checks", "evaluation", "first rows", "first step")
    ]
    assert all(part >= 0.0 for part in seconds.values())
    assert seconds["command"] > 0.1 and seconds["imports"] > 1.0  # Hydra; torch and DeepSpeed
    (first, *_) = steps_of(plain)
    assert first["step_seconds"] == pytest.approx(seconds["first rows"] + seconds["first step"], abs=0.05)
