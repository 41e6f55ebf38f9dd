"""Compare a candidate with the current version, always on the same rows: sets, slices, exchanged words, probes and prompts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dstune.cycle.settings import Gates
from dstune.grading.paired import bootstrap_means
from dstune.grading.verdicts import (
    FEWEST,
    PASSED,
    SHARES,
    SLICE_ROWS,
    WORSE,
    Comparison,
    GateResult,
    decide,
    level_of_worse,
    smallest_margin,
)
from dstune.protocols import PROBES
from dstune.protocols.probe import Probe, Question, asked

NEW_ROWS = "new rows"
KEY = "key "
TAIL = 20
"""Number of resamples that should lie beyond the bound of a key."""
MOST_RESAMPLES = 20_000

Row = Mapping[str, Any]
Scores = Callable[[Sequence[Row]], np.ndarray]
"""Returns a model's score of each row, larger is better: 1 for the right label, or the mean log-probability of the answer's tokens;
NaN for a row that cannot be scored."""
Answers = Callable[[Sequence[Row]], list[str]]
"""Returns a model's answer to each row."""


@dataclass(frozen=True)
class Judge:
    """Scores and answers of one version."""

    scores: Scores
    answers: Answers
    recited: Scores | None = None
    """For a model that writes text: the share of the remainder of each row that it recites when given the beginning."""
    unit: str = SHARES
    """The unit of the scores."""


@dataclass(frozen=True)
class Agreement:
    """The rows of one key and those of all others: 1 if the candidate gives the label that the key gave."""

    key: str
    its: np.ndarray
    others: np.ndarray


def agreements(hits: np.ndarray, keys: Sequence[str]) -> list[Agreement]:
    """Return the agreement of every key with enough rows. hits: 1 if the candidate gives the row's label, [rows]. keys: [rows]."""
    names = np.array(keys)
    pairs = [Agreement(name, hits[names == name], hits[names != name]) for name in sorted(set(keys))]
    return [pair for pair in pairs if min(len(pair.its), len(pair.others)) >= SLICE_ROWS]


def judge_all(gates: Gates, comparisons: Sequence[Comparison], keys: Sequence[Agreement] = ()) -> list[GateResult]:
    """Decide all gates of a cycle within one error budget."""
    count = sum(not comparison.keeps_each for comparison in comparisons) + len(keys)
    level = level_of_worse(gates.error, count)
    return decide(comparisons, gates.error, count) + [
        _judge_key(pair, gates.key_gap, level, gates.bootstrap) for pair in keys
    ]


def _judge_key(pair: Agreement, gap: float, level: float, resamples: int) -> GateResult:
    """Compare a key's rows with those of the other keys: a candidate that has learned from all of them still contradicts a key
    that gives wrong labels. A key passes unless its share of hits is certainly more than `gap` below that of the others.

    In the result, `current` is the share of hits in the other keys' rows, `candidate` that in this key's rows.
    """
    draws = max(resamples, min(math.ceil(TAIL / level), MOST_RESAMPLES))
    gaps = bootstrap_means(pair.its, draws) - bootstrap_means(pair.others, draws, seed=1)
    low, high = (float(value) for value in np.quantile(gaps, [level, 1 - level]))
    share, other_share = float(pair.its.mean()), float(pair.others.mean())
    reason = f"right in {share:.0%} of its rows, and in {other_share:.0%} of the others"
    verdict = PASSED if high >= -gap else WORSE
    return GateResult(f"{KEY}{pair.key}", len(pair.its), other_share, share, low, high, gap, verdict, reason)


def compare(
    gates: Gates,
    sets: Mapping[str, Sequence[Row]],
    prompts: Mapping[str, Sequence[Row]],
    current: Judge,
    candidate: Judge,
) -> list[Comparison]:
    """Compare both versions in all gates. sets: rows with their answers, by name. prompts: rows with `expected` or `pattern`."""
    comparisons = []
    for name, rows_of_set in sets.items():
        rows, scores = _scored(rows_of_set, current.scores(rows_of_set), candidate.scores(rows_of_set))
        if len(rows) < FEWEST:
            continue
        comparisons.append(Comparison(name, *scores, gates.margin, current.unit, is_set=True))
        for column in gates.slices:
            comparisons += _slices(name, column, rows, scores, gates.slice_margin, current.unit)
        if gates.swaps:
            steady = _steady(rows, gates.swaps, current), _steady(rows, gates.swaps, candidate)
            if len(steady[0]) >= FEWEST:
                comparisons.append(Comparison(f"{name}: exchanged words", *steady, gates.margin))
    for name in gates.probes:
        probe = PROBES[name]()
        scores = _probed(probe, current), _probed(probe, candidate)
        comparisons.append(Comparison(probe.title, *scores, gates.probe_margin, has_to_pass=True))
    for name, rows in prompts.items():
        answers = _right(rows, current.answers(rows)), _right(rows, candidate.answers(rows))
        comparisons.append(Comparison(name, *answers, 0.0, keeps_each=True))
    return comparisons


def _scored(
    rows: Sequence[Row], current: np.ndarray, candidate: np.ndarray
) -> tuple[Sequence[Row], tuple[np.ndarray, np.ndarray]]:
    """Return the rows that both versions can score, and both versions' scores of them."""
    is_scored = ~(np.isnan(current) | np.isnan(candidate))
    kept = [row for row, has_score in zip(rows, is_scored, strict=True) if has_score]
    return kept, (current[is_scored], candidate[is_scored])


def all_questions(probe: Probe) -> list[Question]:
    """Return the questions that a gate asks."""
    return [*probe.questions(), *probe.further_questions()]


def undecidable_probes(gates: Gates, probes: Mapping[str, type[Probe]]) -> list[str]:
    """Return a sentence for each of the probes that no candidate can pass at `probe_margin`, because it has too few questions."""
    counts = {name: len(all_questions(kind())) for name, kind in probes.items()}
    return [
        f"gates.probes: {name} has {count} questions, which cannot exclude a loss of {100 * gates.probe_margin:g} points, so every "
        f"candidate will wait for a person: write more questions, or set gates.probe_margin to {math.ceil(100 * least) / 100:g}"
        for name, count in counts.items()
        if (least := smallest_margin(count, gates.error)) > gates.probe_margin
    ]


def _probed(probe: Probe, version: Judge) -> np.ndarray:
    questions = all_questions(probe)
    answers = version.answers([{"messages": [{"role": "user", "content": asked(question)}]} for question in questions])
    return np.array([probe.score(*pair) for pair in zip(questions, answers, strict=True)], dtype=float)


def compare_memory(gates: Gates, taught: Sequence[Row], current: Judge, candidate: Judge) -> list[Comparison]:
    """Compare how much of the candidate's training rows each version does not recite; empty if this gate does not apply."""
    if gates.memorised is None or current.recited is None or candidate.recited is None or len(taught) < FEWEST:
        return []
    return [
        Comparison(
            "training rows not recited", 1 - current.recited(taught), 1 - candidate.recited(taught), gates.memorised
        )
    ]


def _slices(
    name: str, column: str, rows: Sequence[Row], scores: tuple[np.ndarray, np.ndarray], margin: float, unit: str
) -> list[Comparison]:
    values = np.array([json.dumps(row.get(column)) if column in row else "" for row in rows])
    inside = {value: values == value for value in np.unique(values[values != ""])}
    return [
        Comparison(f"{name}: {column}={value}", scores[0][mask], scores[1][mask], margin, unit)
        for value, mask in inside.items()
        if mask.sum() >= SLICE_ROWS
    ]


def _steady(rows: Sequence[Row], swaps: Sequence[tuple[str, str]], version: Judge) -> np.ndarray:
    """Return, for each row that contains one of the words, 1 if the answer stays the same when words are exchanged, else 0."""
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
