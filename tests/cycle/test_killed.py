"""A cycle that is killed at any of its writes ends in the same ledger, files and versions. Trainings are stand-ins here:
`test_story.py` kills real ones."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstune.config.compose import compose
from dstune.config.run_file import write_run
from dstune.core import files
from dstune.core.errors import UserError
from dstune.cycle import steps, training
from dstune.cycle.collect import Row, digest_of_row, read_rows, write_rows
from dstune.cycle.gates import Judge
from dstune.cycle.settings import CycleSettings, Gates
from tests.support.tiny import write_labelled


class Killed(BaseException):
    """What a signal does, as far as the files see."""


def stand_in_training(run: Path) -> None:
    (run / "result.json").write_text(json.dumps({"status": "completed", "steps": 6}))


def stand_in_export(run: Path, target: Path, *, with_reference: bool = True) -> str:
    """Weights that depend on the rows that were trained on."""
    rows = run.parent / "train.jsonl"
    target.mkdir(parents=True, exist_ok=True)
    (target / "model.safetensors").write_bytes(rows.read_bytes() if rows.is_file() else b"first")
    return training.weights_digest(target)


def stand_in_judge(folder: Path, config: Any) -> Judge:
    return Judge(lambda rows: np.ones(len(rows)), lambda rows: ["a" for _ in rows])


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(training, "train", stand_in_training)
    monkeypatch.setattr(training, "export_model", stand_in_export)
    monkeypatch.setattr(steps, "judge_of", stand_in_judge)
    rows = write_labelled(tmp_path / "rows.jsonl", 60)
    words = ["model.path=/nowhere", "data=files", f"data.train={rows}", "data.split.validation=0.3"]
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run" / "run.yaml", compose([*words, "task=classification", "task.labels=[left,right]"]))
    return tmp_path


def content_of(folder: Path) -> dict[str, str]:
    """All files but the lock and the runs, by name; without the times of the ledger's lines."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_file() and file.name != ".lock" and "/run/" not in name:
            found[name] = re.sub(r', "time": "[^"]*"', "", file.read_text().replace(str(folder), "FOLDER"))
    return found


def killed_at(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let the write of that number raise, before anything is written or after."""
    number = itertools.count(1)
    for name in ("write", "append"):
        real = getattr(files, name)

        def act(*arguments: Any, real: Any = real, **options: Any) -> Any:
            turn = next(number)
            if 2 * turn - 1 == count:
                raise Killed
            result = real(*arguments, **options)
            if 2 * turn == count:
                raise Killed
            return result

        patch.setattr(files, name, act)


def cycled(base: Path, name: str, kill: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], bool]:
    write_labelled(base / "feedback.jsonl", 50, seed=5)
    settings = CycleSettings(
        base / "run", base / name, str(base / "feedback.jsonl"), least_rows=10, replay=0.0, share_per_key=1.0,
        gates=Gates(margin=0.2),
    )  # fmt: skip
    was_killed = False
    with monkeypatch.context() as patch:
        killed_at(patch, kill)
        try:
            steps.Cycle(settings).run()
        except Killed:
            was_killed = True
    if was_killed and not (base / name / "cycles" / "0001" / "done.json").is_file():
        assert steps.Cycle(settings).run() == "challenges"
    return content_of(base / name), was_killed


def test_killed_at_any_write_it_ends_in_the_same_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, was_killed = cycled(base, "whole", 0, monkeypatch)
    assert not was_killed
    lines = [json.loads(line) for line in expected["ledger.jsonl"].splitlines()]
    assert [line["step"] for line in lines] == ["collect", "train", "judge", "register"]
    assert "versions/v2/model.safetensors" in expected and "registry.json" in expected
    for kill in itertools.count(1):
        found, was_killed = cycled(base, f"killed-{kill}", kill, monkeypatch)
        assert found == expected, kill
        if not was_killed:
            break
    assert kill > 25  # two places a write


def test_a_held_candidate_is_judged_again_after_rows_were_added(base: Path) -> None:
    """A set of 18 rows can show nothing; one of 300 can, unless the candidate was trained on them."""
    write_labelled(base / "feedback.jsonl", 50, seed=5)
    held = CycleSettings(
        base / "run", base / "cycle", str(base / "feedback.jsonl"), least_rows=10, replay=0.0, share_per_key=1.0
    )
    assert steps.Cycle(held).run() == "held"
    cycle = steps.Cycle(held)
    assert cycle.registry.aliases == {"live": {"v1": 1.0}} and cycle.registry.challenger == "v2"
    assert "validation (18 rows, " in cycle.ledger.lines[-1]["reason"]
    assert steps.Cycle(held).run() == "waiting"
    write_labelled(base / "frozen.jsonl", 300, seed=9)
    larger = replace(held, gates=Gates(tests=(str(base / "frozen.jsonl"),)))
    assert steps.Cycle(larger).judge_again() == "challenges"
    cycle = steps.Cycle(larger)
    assert cycle.registry.aliases == {"live": {"v1": 0.9, "v2": 0.1}}
    assert [(line["cycle"], line["step"], line["decision"]) for line in cycle.ledger.lines[-2:]] == [
        (1, "judge", "passed"),
        (1, "register", "challenges"),
    ]
    write_rows(base / "frozen.jsonl", read_rows(base / "cycle" / "cycles" / "0001" / "train.jsonl"))
    with pytest.raises(UserError, match="was trained on ask what these rows ask"):
        steps.Cycle(larger).judge_again()


def test_killed_while_it_forgets_rows_and_origins_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that another cycle has too stays once."""
    rows = [{"text": text} for text in ("both", "gone", "first", "both", "kept")]
    cycles = [1, 1, 0, 2, 1]
    origins = [{"digest": digest_of_row(row), "cycle": cycle} for row, cycle in zip(rows, cycles, strict=True)]
    for kill in itertools.count(1):
        place = tmp_path / str(kill) / "cycles" / "0002"
        write_rows(place / "train.jsonl", rows)
        write_rows(place / "lineage-train.jsonl", origins)
        settings = CycleSettings(tmp_path / "run", tmp_path / str(kill), "feedback.jsonl")
        left = [Row("k", "", "", "label", {"text": "kept"}, is_held_out=False)]
        with monkeypatch.context() as patch:
            killed_at(patch, kill)
            try:
                steps.Cycle(settings)._forget_copies(1, left)
                was_killed = False
            except Killed:
                was_killed = True
        steps.Cycle(settings)._forget_copies(1, left)
        assert sorted(row["text"] for row in read_rows(place / "train.jsonl")) == ["both", "first", "kept"]
        assert [origin["cycle"] for origin in read_rows(place / "lineage-train.jsonl")] == [0, 2, 1]
        if not was_killed:
            break
    assert kill == 5  # two writes, killed before and after each


def test_a_cycle_starts_from_the_version_alone(tmp_path: Path) -> None:
    """What the first run brought to its model is in the export: nothing of it is applied a second time."""
    words = ["model.path=/nowhere", "data.train=rows.jsonl", "task=chat", "method=lora", "method.rank=4"]
    words += ["method.adapter=/old", "method.frozen_adapters=[/older]", "model.weights=random", "model.rope.type=yarn"]
    base = compose([*words, "model.config_overrides={num_hidden_layers: 2}", "model.revision=main"]).config
    config = training.config_from_version(base, tmp_path)
    assert (config.model.path, config.model.weights.name, config.model.revision) == (str(tmp_path), "pretrained", None)
    assert config.model.rope.type is None and config.model.config_overrides == {}
    assert config.method == compose(words[:5]).config.method


def test_a_version_that_was_rolled_back_is_not_trained_again_from_the_same_rows(base: Path) -> None:
    write_labelled(base / "feedback.jsonl", 50, seed=5)
    settings = CycleSettings(
        base / "run", base / "cycle", str(base / "feedback.jsonl"), least_rows=10, replay=0.0, share_per_key=1.0,
        gates=Gates(margin=0.2),
    )  # fmt: skip
    assert steps.Cycle(settings).run() == "challenges"
    registry = steps.Cycle(settings).registry
    registry.roll_back(settings.alias)
    registry.write()
    assert steps.Cycle(settings).run() == "nothing"
    write_labelled(base / "feedback.jsonl", 80, seed=5)
    assert steps.Cycle(settings).run() == "challenges"


def without_a_trained_row(base: Path, folder: Path, cycle: int) -> str:
    """Delete a row of a cycle's training from the feedback. Returns its text."""
    text = read_rows(folder / "cycles" / f"{cycle:04d}" / "train.jsonl")[0]["text"]
    rows = read_rows(base / "feedback.jsonl")
    write_rows(base / "feedback.jsonl", [row for row in rows if row["text"] != text])
    return str(text)


def test_a_deletion_is_followed_by_a_training_however_few_rows_are_new(base: Path) -> None:
    write_labelled(base / "feedback.jsonl", 50, seed=5)
    settings = CycleSettings(
        base / "run", base / "cycle", str(base / "feedback.jsonl"), least_rows=10, replay=0.0, share_per_key=1.0,
    )  # fmt: skip
    assert steps.Cycle(settings).run() == "held"
    registry = steps.Cycle(settings).registry
    registry.promote(settings.alias)
    registry.write()
    assert steps.Cycle(settings).run() == "nothing"
    deleted = without_a_trained_row(base, settings.folder, 1)
    cycle = steps.Cycle(settings)
    assert cycle.run() == "challenges"  # by its gates it would be held, as v2 was
    version = cycle.registry.versions[cycle.version]
    assert (version["parent"], version["rows_of"]) == ("v1", [1])
    assert cycle.registry.aliases == {"live": {"v2": 0.9, cycle.version: 0.1}}
    assert "v2 holds deleted rows" in cycle.ledger.lines[-1]["reason"]
    assert deleted not in {row["text"] for row in read_rows(cycle.place / "train.jsonl")}


def test_a_challenger_that_was_trained_on_deleted_rows_makes_way(base: Path) -> None:
    write_labelled(base / "feedback.jsonl", 50, seed=5)
    settings = CycleSettings(
        base / "run", base / "cycle", str(base / "feedback.jsonl"), least_rows=10, replay=0.0, share_per_key=1.0,
        gates=Gates(margin=0.2),
    )  # fmt: skip
    assert steps.Cycle(settings).run() == "challenges"
    deleted = without_a_trained_row(base, settings.folder, 1)
    cycle = steps.Cycle(settings)
    assert cycle.run() == "challenges"
    versions = cycle.registry.versions
    assert (versions["v2"]["status"], versions["v3"]["status"]) == ("refused", "challenger")
    assert cycle.registry.aliases == {"live": {"v1": 0.9, "v3": 0.1}}
    trained = {row["text"] for row in read_rows(cycle.place / "train.jsonl")}
    assert deleted not in trained and len(trained) > 30


def test_killed_while_a_challenger_makes_way_it_ends_in_the_same_versions(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_labelled(base / "feedback.jsonl", 50, seed=5)
    first = CycleSettings(
        base / "run", base / "first", str(base / "feedback.jsonl"), least_rows=10, replay=0.0, share_per_key=1.0,
        gates=Gates(margin=0.2),
    )  # fmt: skip
    assert steps.Cycle(first).run() == "challenges"
    without_a_trained_row(base, first.folder, 1)
    expected = None
    for kill in itertools.count(0, 3):  # before a write, and after one
        settings = replace(first, folder=base / f"killed-{kill}")
        shutil.copytree(first.folder, settings.folder)
        with monkeypatch.context() as patch:
            killed_at(patch, kill)
            try:
                steps.Cycle(settings).run()
                was_killed = False
            except Killed:
                was_killed = True
        if was_killed and not (settings.folder / "cycles" / "0002" / "done.json").is_file():
            assert steps.Cycle(settings).run() == "challenges", kill
        content = content_of(settings.folder)
        lines = [json.loads(line)["step"] for line in content["ledger.jsonl"].splitlines()]
        found = content["registry.json"], content["cycles/0002/train.jsonl"], content["rows/0001.jsonl"], lines
        expected = expected or found
        assert found == expected, kill
        if kill and not was_killed:
            break
    assert kill > 25 and lines.count("withdraw") == 1
