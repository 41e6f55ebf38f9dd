"""How many attacks that are hidden in documents are flagged at a rate of false alarms: figures of docs/guard-model.md.

python benchmarks/guard_documents.py EXPORT [--scores FILE] [--seconds 570]

Thresholds come from the documents of the calibration alone, at 1, 2 and 5%, then from all its texts that no user wrote, as
`dstune guard calibrate` sets them but for encoded parts. Hidden attacks and documents of the test are flagged with them. Windows
are those of the model, of the first 4,000 characters. FILE keeps scores: the command may be given again until it has all.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from guard import rows_of

from dstune.samples.attacks.texts import place
from dstune.samples.attacks.write import DOCUMENT_CHARACTERS, HIDDEN_CHARACTERS
from dstune.serve.guard.calibration import LEVELS
from dstune.serve.guard.measure.calibrate import Scored, threshold_at, thresholds
from dstune.serve.guard.measure.report import wilson
from dstune.serve.guard.model import GuardModel

TOGETHER = 8
"""Texts that are scored together."""
SHORT_WINDOWS = 4
"""Texts of more windows are documents."""


def margin(score: float) -> float:
    return math.log(score / (1 - score))


def above_all_but(most: int) -> Callable[[Sequence[float]], float]:
    """The highest margin less the mean of all but the highest `most`."""

    def contrast(scores: Sequence[float]) -> float:
        values = sorted(map(margin, scores), reverse=True)
        others = values[most:] or [0.0]
        return values[0] - sum(others) / len(others)

    return contrast


WAYS: dict[str, Callable[[Sequence[float]], float]] = {
    "the highest window": max,
    "the highest above the mean of all but two": above_all_but(2),
    "the highest above the lowest": lambda scores: margin(max(scores)) - margin(min(scores)),
    "the highest, and its height above that mean, added": lambda scores: margin(max(scores)) + above_all_but(2)(scores),
}


def scored(model: GuardModel, texts: Sequence[str], keep: Path, seconds: float) -> dict[float, list[float]]:
    """The scores of the windows of each text, by its place."""
    known = {one["place"]: one["scores"] for one in map(json.loads, keep.read_text().splitlines())}
    left = {place(text): text for text in texts if place(text) not in known}
    documents_first = sorted(left, key=lambda one: (len(left[one]) < DOCUMENT_CHARACTERS, one))
    turns, until = documents_first, time.monotonic() + seconds
    while turns and time.monotonic() < until:
        turn, turns = turns[:TOGETHER], turns[TOGETHER:]
        found = model.scores([left[one] for one in turn])
        known |= dict(zip(turn, found, strict=True))
        with keep.open("a") as file:
            file.writelines(json.dumps({"place": one, "scores": known[one]}) + "\n" for one in turn)
    print(f"{len(turns)} texts not scored yet")
    return known


def flagged(found: Sequence[bool]) -> str:
    low, high = wilson(sum(found), len(found))
    return f"{sum(found) / len(found):.1%} ({sum(found)} of {len(found)}; {low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("--scores", type=Path, help="file that keeps the scores")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which it ends with what it has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = GuardModel.load(options.export)
    test, calibration = rows_of("sample://attacks:test"), rows_of("sample://attacks:calibration")
    rows = [(one["suite"], one) for one in test if one["suite"] in ("hidden", "document")]
    rows += [("calibration", one) for one in calibration if one["direction"] != "input"]
    texts = [one["text"][:HIDDEN_CHARACTERS] for _, one in rows]
    with tempfile.NamedTemporaryFile(prefix="dstune-guard-") as scratch:
        keep = options.scores or Path(scratch.name)
        keep.touch()
        known = scored(model, texts, keep, options.seconds)
    found: dict[str, list[Scored]] = {"hidden": [], "document": [], "calibration": []}
    for (kind, one), text in zip(rows, texts, strict=True):
        if scores := known.get(place(text)):
            found[kind].append(Scored(one["direction"], tuple(scores), ()))
    documents = [one.plain for one in found["calibration"] if len(one.plain) > SHORT_WINDOWS]
    print("| threshold of | rate | hidden attacks flagged | documents of the test flagged |\n| --- | --- | --- | --- |")
    for name, way in WAYS.items():
        highest = sorted(map(way, documents))
        for rate in (0.01, 0.02, 0.05):
            threshold = threshold_at(highest, rate)
            cells = [flagged([way(one.plain) >= threshold for one in found[kind]]) for kind in ("hidden", "document")]
            print(f"| {name}, {len(documents)} documents | {rate:.0%} | {' | '.join(cells)} |")
    made = thresholds(found["calibration"], model, [one for _, one in rows], "sample://attacks:calibration")
    for number, (level, rate) in enumerate(LEVELS.items()):
        reached = list(LEVELS)[: number + 1]
        cells = [
            flagged([made.level(one.direction, len(one.plain), max(one.plain)) in reached for one in found[kind]])
            for kind in ("hidden", "document")
        ]
        print(f"| {level}, {len(found['calibration'])} texts | {rate:.1%} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
