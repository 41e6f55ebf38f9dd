"""What gates decide of candidates that are drawn, and topics that arrive one after another: see `benchmarks/cycle.py`."""

from __future__ import annotations

import io
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dstune.cli import main
from dstune.cycle import training
from dstune.cycle.decisions import summarize
from dstune.cycle.registry import Registry
from dstune.grading.verdicts import Comparison, decide
from support import warm_start
from tests.support import topics
from tests.support.cycling import ARRIVING, CLIENTS, FIRST, TRAINING, Place, Say, read_lines

STRICT = {"tests": ["frozen.jsonl"], "slices": ["topic"], "margin": 0.02}


class PlaceOfRounds(Place):
    """Runs cycles in this process, which spares their imports; trainings are processes as ever."""

    def succeed(self, *words: str, code: int = 0) -> str:
        if words[0] != "cycle":
            return super().succeed(*words, code=code)
        self.say(f"$ dstune {shlex.join(words)}")
        printed = io.StringIO()
        environment = mock.patch.dict("os.environ", self.env)
        with redirect_stdout(printed), environment, mock.patch.object(training.subprocess, "run", warm_start.run):
            assert main(["cycle", str(self.folder / words[1]), *words[2:]]) == code
        return printed.getvalue()


# -- what gates decide of candidates that are drawn


def gates(
    say: Say, repeats: int = 200, rows: int = 2000, flips: float = 0.04, margin: float = 0.02
) -> list[dict[str, Any]]:
    """Draw candidates and judge them by 2, 10 and 50 gates. Returns the shares that pass, are held and are refused.

    flips: share of the rows whose answer changes. Two gates are sets, the others slices of a tenth of the rows whose margin is
    2.5 times as large.
    """
    generator, found = np.random.default_rng(0), []
    for loss, where in (
        (0.0, "as good"),
        (2 * margin, "twice the margin worse on a set"),
        (0.2, "20 points worse on a slice"),
    ):
        for count in (2, 10, 50):
            decisions: Counter[str] = Counter()
            for _ in range(repeats):
                losses = [0.0] * count
                losses[-1 if where.endswith("slice") else 0] = loss
                comparisons = [
                    _drawn(
                        generator,
                        rows if at < 2 else rows // 10,
                        flips,
                        lost,
                        margin if at < 2 else 2.5 * margin,
                        at < 2,
                    )
                    for at, lost in enumerate(losses)
                ]
                lines = [asdict(result) for result in decide(comparisons, 0.025, count)]
                decisions[{"failed": "refused", "undecided": "held"}.get(state := summarize(lines)[0], state)] += 1
            shares = {name: number / repeats for name, number in sorted(decisions.items())}
            found.append({"candidate": where, "gates": count, **shares})
            say(str(found[-1]))
    return found


PROBES_OF_A_GATE = 4


def probes(say: Say, repeats: int = 1000, flips: float = 0.02, margin: float = 0.05) -> list[dict[str, Any]]:
    """Draw candidates that pass two sets and answer four probes. Returns the shares that pass, are held and are refused.

    flips: share of the questions whose answer changes by chance. A worse candidate loses points in one of the probes.
    """
    generator, found = np.random.default_rng(0), []
    for questions in (24, 36, 100, 200):
        for loss in (0.0, 0.1, 0.28):
            decisions: Counter[str] = Counter()
            for _ in range(repeats):
                sets = [_drawn(generator, 2000, 0.04, 0.0, 0.02, is_set=True) for _ in range(2)]
                losses = [loss] + [0.0] * (PROBES_OF_A_GATE - 1)
                answered = [_drawn(generator, questions, flips, lost, margin, is_set=False) for lost in losses]
                answered = [replace(comparison, has_to_pass=True) for comparison in answered]
                lines = [asdict(result) for result in decide([*sets, *answered], 0.025, 2 + PROBES_OF_A_GATE)]
                decisions[{"failed": "refused", "undecided": "held"}.get(state := summarize(lines)[0], state)] += 1
            shares = {name: number / repeats for name, number in sorted(decisions.items())}
            found.append({"questions": questions, "loss": loss, **shares})
            say(str(found[-1]))
    return found


def _drawn(
    generator: np.random.Generator, rows: int, flips: float, loss: float, margin: float, is_set: bool
) -> Comparison:
    chances = [flips / 2, 1 - flips - loss, flips / 2 + loss]
    difference = generator.choice([1.0, 0.0, -1.0], size=rows, p=chances)
    return Comparison("", (difference < 0) * 1.0, (difference > 0) * 1.0, margin, is_set=is_set)


# -- topics that arrive one after another


STEPS = [
    *(word for word in TRAINING if not word.startswith("optimizer.lr=")),
    "optimizer.lr=1e-3",
    "trainer.max_steps=200",
]
"""Of each round: a third of the first run's rate, since the weights are to stay near those of the version before."""
REPLAY = 0.8
"""Share of the old rows, of up to five topics, beside the new ones of one topic."""


def rounds(folder: Path, say: Say, rows: int = 600, tested: int = 1500) -> dict[str, Any]:
    """Five rounds by `dstune cycle`, beside plain fine-tuning and a training on everything. Returns accuracies in percent."""
    os.chdir(folder)  # the first run names its rows as they are seen from there
    place, first_rows = PlaceOfRounds(folder, say), topics.reviews(FIRST, 4000, 0)
    if not (folder / "first" / "result.json").is_file():
        place.train("first", first_rows, "trainer.max_steps=150", held_out=0.4)
    tests = {topic: topics.reviews(topic, tested, 9) for topic in topics.TOPICS}
    seen: dict[str, Any] = {"cycle": _arm(place, "cycle", rows, tests, {"replay": REPLAY, "gates": STRICT})}
    said = read_lines(folder / "said.jsonl")
    # More than the 1,150 steps of the first run and five rounds, so that it is no easy comparison.
    everything = place.train("everything", [*first_rows, *said], "trainer.max_steps=1650")
    seen["everything"] = {name: accuracy(everything, tested_rows) for name, tested_rows in tests.items()}
    say(f"trained on everything: {seen['everything']}")
    seen["measured rows in training"] = leaked(folder / "cycle", folder)
    say(f"measured rows in training: {seen['measured rows in training']}")
    seen["poisoned"] = _poisoned(place, said, tests, seen["cycle"][-1], say)
    config = place.configure("first", "said.jsonl", "careless", overrides=STEPS, replay=0.0, gates=STRICT)
    seen["careless"] = _judged(place, config, say)
    seen["plain"] = _arm(place, "plain", rows, tests, {"replay": 0.0, "gates": {"margin": 100}})
    return seen


def _arm(place: Place, name: str, rows: int, tests: Mapping[str, Any], changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A cycle for each topic that arrives; a challenger is promoted. Before the last one the folder is copied to `careless`."""
    said: list[dict[str, Any]] = []
    frozen, found = topics.reviews(FIRST, 1000, 8), []
    for number, topic in enumerate(ARRIVING):
        said += topics.feedback(topic, rows, 1, keys=CLIENTS)
        leaks = enumerate(topics.reviews(topic, 20, 8))
        said += [row | {"id": f"leak-{topic}-{at}", "key": "web"} for at, row in leaks]
        topics.write(place.folder / "said.jsonl", said)
        frozen += topics.reviews(topic, 1000, 8)
        topics.write(place.folder / "frozen.jsonl", frozen)
        if name == "cycle" and topic == ARRIVING[-1]:
            shutil.copytree(place.folder / "cycle", place.folder / "careless")
        config = place.configure("first", "said.jsonl", name, overrides=STEPS, **changes)
        outcome = _judged(place, config, place.say)
        if outcome["decision"] == "challenges":  # a held one would need more rows, or a person
            place.cycle(config, "promote")
        current = place.folder / name / "versions" / str(Registry.read(place.folder / name).current)
        outcome["accuracy"] = {name: accuracy(current, tests[name]) for name in topics.TOPICS[: number + 2]}
        found.append({"round": number + 1, "topic": topic, **outcome})
        place.say(f"round {number + 1}, {name}: {outcome['decision']}, {outcome['accuracy']}")
    return found


def _judged(place: Place, config: str, say: Say) -> dict[str, Any]:
    """Run a cycle. Returns its decision with the reason, and the rows that were left out."""
    result = place.cycle(config)
    lines = {line["step"]: line for line in result["ledger"] if line["cycle"] == result["ledger"][-1]["cycle"]}
    say(f"{config}: {lines['register']['decision']}: {lines['register']['reason']}")
    return {
        "decision": result["decision"],
        "reason": lines["register"]["reason"],
        "version": lines["register"]["version"],
        "dropped": lines["collect"]["dropped"],
    }


def _poisoned(
    place: Place, said: list[dict[str, Any]], tests: Mapping[str, Any], before: Mapping[str, Any], say: Say
) -> dict[str, Any]:
    """A sixth round: five keys give 60 labels each, and a sixth one gives 900, all wrong, of all topics."""
    honest = [row for topic in topics.TOPICS for row in topics.feedback(topic, 50, 2, keys=CLIENTS[:5])]
    wrong = [row for topic in topics.TOPICS for row in topics.flipped(topics.feedback(topic, 150, 3, keys=["mallory"]))]
    topics.write(place.folder / "poisoned.jsonl", [*said, *honest, *wrong])
    seen = {"before": before["accuracy"]}
    arms = {"limited": {}, "unlimited": {"share_per_key": 1.0}, "excluded": {"exclude_keys": ["mallory"]}}
    for name, changes in arms.items():
        shutil.copytree(place.folder / "cycle", place.folder / name)
        config = place.configure(
            "first", "poisoned.jsonl", name, overrides=STEPS, replay=REPLAY, gates=STRICT, **changes
        )
        outcome = _judged(place, config, say)
        version = place.folder / name / "versions" / outcome["version"]
        outcome["accuracy of the candidate"] = {topic: accuracy(version, rows) for topic, rows in tests.items()}
        say(f"{name}: {outcome['accuracy of the candidate']}")
        seen[name] = outcome
    return seen


def accuracy(model: Path, rows: Sequence[Mapping[str, Any]]) -> float:
    """In percent."""
    from dstune.api.models import predict

    answers = predict(model, [{"text": row["text"]} for row in rows], batch_size=200)
    hits = sum(answer["predicted"] == row["label"] for answer, row in zip(answers, rows, strict=True))
    return round(100 * hits / len(rows), 1)


def leaked(cycle: Path, folder: Path) -> dict[str, int]:
    """How many rows that were measured on are among those of any training, by the digest of their text, and how many there are."""
    measured = {topics.digest_of_text(row) for row in read_lines(folder / "frozen.jsonl")}
    measured |= {
        topics.digest_of_text(row) for file in cycle.glob("cycles/*/validation.jsonl") for row in read_lines(file)
    }
    stored = [row for file in cycle.glob("rows/*.jsonl") for row in read_lines(file)]
    measured |= {topics.digest_of_text(row["row"]) for row in stored if row["is_held_out"]}
    files = [*cycle.glob("cycles/*/train.jsonl"), *cycle.glob("cycles/*/old.jsonl")]
    trained = {topics.digest_of_text(row) for file in files for row in read_lines(file)}
    return {"measured": len(measured), "trained": len(trained), "both": len(measured & trained)}
