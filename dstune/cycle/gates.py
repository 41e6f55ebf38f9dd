"""The candidate against the current version, on the same rows: paired differences with bootstrap intervals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dstune.cycle.settings import Gates
from dstune.grading.paired import bootstrap_means, interval, paired_interval
from dstune.protocols import PROBES
from dstune.protocols.probe import Probe, asked

SLICE_ROWS = 20
"""Rows of a slice below which it is not judged."""
FEWEST = 5
"""Rows of a set below which it is not judged."""

KEY = "key "

Row = Mapping[str, Any]
Scores = Callable[[Sequence[Row]], np.ndarray]
"""A model's score of each row, larger is better: 1 for the right label, or the log-probability of a token of the answer."""
Answers = Callable[[Sequence[Row]], list[str]]
"""A model's answer to each row."""


@dataclass(frozen=True)
class Judge:
    """One version."""

    scores: Scores
    answers: Answers
    recited: Scores | None = None
    """Of a model that writes text: the share of each row's rest that it recites behind the beginning."""


@dataclass(frozen=True)
class GateResult:
    """What a gate says."""

    name: str
    rows: int
    current: float
    candidate: float
    low: float
    high: float
    """95% interval of the mean paired difference, candidate less current."""
    margin: float
    passed: bool
    reason: str

    @property
    def gain(self) -> float:
        return self.candidate - self.current


def compare(name: str, scores: tuple[np.ndarray, np.ndarray], margin: float, resamples: int) -> GateResult:
    """Judge paired scores [rows], of the current version and the candidate, which passes unless it may be worse by the margin.

    By the percentile bootstrap of `dstune.grading.paired`.
    """
    current, candidate = scores
    difference = candidate - current
    low, high = paired_interval(current, candidate, resamples)
    passed = low >= -margin
    reason = f"{difference.mean():+.4f} ({low:+.4f} to {high:+.4f}), allowed from {-margin:+.4f}"
    return GateResult(
        name, len(difference), float(current.mean()), float(candidate.mean()), low, high, margin, passed, reason
    )


def compare_keys(hits: np.ndarray, keys: Sequence[str], gap: float, resamples: int) -> list[GateResult]:
    """Hold each key's rows against those of the others: the candidate has learned from all, and still contradicts one that gives
    wrong labels. A key passes unless its share of hits is surely lower than that of the others by more than `gap`.

    hits: 1 where the candidate gives the row's label [rows]. keys: who gave the row [rows]. The results' `current` is of the other
    keys' rows, `candidate` of this one's.
    """
    names, results = np.array(keys), []
    for name in sorted(set(keys)):
        its, others = hits[names == name], hits[names != name]
        if min(len(its), len(others)) < SLICE_ROWS:
            continue
        low, high = interval(bootstrap_means(its, resamples) - bootstrap_means(others, resamples, seed=1))
        share, other_share = float(its.mean()), float(others.mean())
        reason = f"right in {share:.0%} of its rows, and in {other_share:.0%} of the others"
        result = GateResult(f"{KEY}{name}", len(its), other_share, share, low, high, gap, high >= -gap, reason)
        results.append(result)
    return results


def judge(
    gates: Gates,
    sets: Mapping[str, Sequence[Row]],
    prompts: Mapping[str, Sequence[Row]],
    current: Judge,
    candidate: Judge,
) -> list[GateResult]:
    """Put both versions to all gates. sets: rows with their answers, by name. prompts: rows with `expected` or `pattern`."""
    results = []
    for name, rows in sets.items():
        if len(rows) < FEWEST:
            continue
        scores = current.scores(rows), candidate.scores(rows)
        results.append(compare(name, scores, gates.margin, gates.bootstrap))
        for column in gates.slices:
            results += _slices(name, column, rows, scores, gates)
        if gates.swaps:
            steady = _steady(rows, gates.swaps, current), _steady(rows, gates.swaps, candidate)
            if len(steady[0]) >= FEWEST:
                results.append(compare(f"{name}: exchanged words", steady, gates.margin, gates.bootstrap))
    for name in gates.probes:
        probe = PROBES[name]()
        pairs = _probed(probe, current), _probed(probe, candidate)
        results.append(compare(probe.title, pairs, gates.probe_margin, gates.bootstrap))
    for name, rows in prompts.items():
        answers = _right(rows, current.answers(rows)), _right(rows, candidate.answers(rows))
        results.append(compare(name, answers, 0.0, gates.bootstrap))
    return results


def _probed(probe: Probe, version: Judge) -> np.ndarray:
    questions = list(probe.questions())
    answers = version.answers([{"messages": [{"role": "user", "content": asked(question)}]} for question in questions])
    return np.array([probe.score(*pair) for pair in zip(questions, answers, strict=True)], dtype=float)


def judge_memory(gates: Gates, taught: Sequence[Row], current: Judge, candidate: Judge) -> list[GateResult]:
    """Compare how much of the rows that the candidate was trained on each version does not recite."""
    if gates.memorised is None or current.recited is None or candidate.recited is None or len(taught) < FEWEST:
        return []
    forgotten = 1 - current.recited(taught), 1 - candidate.recited(taught)
    return [compare("training rows not recited", forgotten, gates.memorised, gates.bootstrap)]


def _slices(
    name: str, column: str, rows: Sequence[Row], scores: tuple[np.ndarray, np.ndarray], gates: Gates
) -> list[GateResult]:
    values = np.array([json.dumps(row.get(column)) if column in row else "" for row in rows])
    results = []
    for value in np.unique(values[values != ""]):
        inside = values == value
        if inside.sum() >= SLICE_ROWS:
            parts = scores[0][inside], scores[1][inside]
            results.append(compare(f"{name}: {column}={value}", parts, gates.slice_margin, gates.bootstrap))
    return results


def _steady(rows: Sequence[Row], swaps: Sequence[tuple[str, str]], version: Judge) -> np.ndarray:
    """Return 1 where the answer stays when words are exchanged, of the rows that have one of the words."""
    pairs = [(row, swapped) for row in rows if (swapped := swapped_row(row, swaps)) != dict(row)]
    if not pairs:
        return np.zeros(0)
    answers = version.answers([row for row, _ in pairs]), version.answers([swapped for _, swapped in pairs])
    return np.array([first == second for first, second in zip(*answers, strict=True)], dtype=float)


def swapped_row(row: Row, swaps: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the row with the words of each pair exchanged in its text."""
    others = {first.lower(): second for first, second in swaps} | {second.lower(): first for first, second in swaps}
    words = re.compile(r"\b(" + "|".join(re.escape(word) for word in others) + r")\b", re.IGNORECASE)

    def exchange(text: str) -> str:
        return words.sub(lambda match: _cased(match[0], others[match[0].lower()]), text)

    changed = dict(row)
    if isinstance(row.get("text"), str):
        changed["text"] = exchange(row["text"])
    if isinstance(row.get("messages"), list):
        changed["messages"] = [
            message | {"content": exchange(message["content"])}
            if message.get("role") == "user" and isinstance(message.get("content"), str)
            else message
            for message in row["messages"]
        ]
    return changed


def _cased(word: str, other: str) -> str:
    return other.capitalize() if word[:1].isupper() else other


def _right(rows: Sequence[Row], answers: Sequence[str]) -> np.ndarray:
    return np.array([_is_right(row, answer) for row, answer in zip(rows, answers, strict=True)], dtype=float)


def _is_right(row: Row, answer: str) -> bool:
    if isinstance(row.get("pattern"), str):
        return re.search(row["pattern"], answer, re.IGNORECASE) is not None
    return answer.strip() == str(row.get("expected", "")).strip()
