"""Kinds of tasks, how their answers are scored, and what the scores show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dstune.core.parsing import parse_json
from dstune.grading.similarity import MOST_CHARACTERS, rouge_l
from dstune.grading.verdicts import FEWEST, PASSED, SLICE_ROWS, UNDECIDED, WORSE, Comparison, GateResult, decide

SHORT = 60
"""Characters of a short answer, which is compared as a whole."""
MOST_CLASSES = 50


@dataclass(frozen=True)
class Row:
    """A prompt, its expected answer, and the answers of both models."""

    prompt: str
    expected: str
    """Empty if none is known."""
    old: str
    new: str
    preference: float | None = None
    """How much better the judge finds the new answer, from 0 to 1; None without its verdict."""


Score = Callable[[Row], tuple[float, float]]
"""The scores of the old and the new answer, from 0 to 1."""


@dataclass(frozen=True)
class Kind:
    """A kind of task: its rows, and how their answers are scored."""

    name: str
    rows: list[Row]
    scores: Mapping[str, Score]
    """By what they measure; the first one also orders the examples."""
    has_classes: bool = False


def kinds_of(rows: Sequence[Row]) -> tuple[list[Kind], list[str]]:
    """Return the rows by kind of task, which the expected answers show, and notes about kinds with too few rows, which are left
    out."""
    with_answer = [row for row in rows if row.expected]
    objects = [row for row in with_answer if _object(row.expected) is not None]
    others = [row for row in with_answer if _object(row.expected) is None]
    short = [row for row in others if len(row.expected) <= SHORT]
    long = [row for row in others if len(row.expected) > SHORT]
    classes = len({row.expected for row in short})
    is_classified = 1 < classes <= MOST_CLASSES and 2 * classes <= len(short)
    kinds = [
        Kind("JSON", objects, {"agreement of fields": both(agreement), "valid": both(is_valid)}),
        Kind("classes" if is_classified else "short answers", short, {"exact match": both(exact)}, is_classified),
        Kind("texts", long, {"similarity (ROUGE-L)": both(similarity)}),
        Kind("judge", [row for row in rows if row.preference is not None], {"preferred": preferred}),
    ]
    few = [
        f"{len(kind.rows)} prompts of the kind {kind.name!r} are too few"
        for kind in kinds
        if 0 < len(kind.rows) < FEWEST
    ]
    return [kind for kind in kinds if len(kind.rows) >= FEWEST], few


def both(score: Callable[[str, str], float]) -> Score:
    """Return the score of both answers of a row. score: of an answer and the expected one."""
    return lambda row: (score(row.old, row.expected), score(row.new, row.expected))


def preferred(row: Row) -> tuple[float, float]:
    assert row.preference is not None
    return 1 - row.preference, row.preference


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def exact(answer: str, expected: str) -> float:
    return float(answer == expected)


def similarity(answer: str, expected: str) -> float:
    """Return ROUGE-L of the beginnings of both texts: a server may answer more than it was asked for."""
    return rouge_l(answer[:MOST_CHARACTERS], expected[:MOST_CHARACTERS])


def is_valid(answer: str, expected: str) -> float:
    return float(_object(answer) is not None)


def agreement(answer: str, expected: str) -> float:
    """Return the share of fields, expected or answered, that have the same value."""
    answered, fields = _object(answer), _object(expected)
    if answered is None or fields is None:
        return 0.0
    names = {*answered, *fields}
    same = sum(name in answered and name in fields and answered[name] == fields[name] for name in names)
    return same / len(names) if names else 1.0


def scores_of(rows: Sequence[Row], score: Score) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the old and the new model, [rows] each."""
    old, new = zip(*map(score, rows), strict=True)
    return np.array(old), np.array(new)


def decide_kinds(kinds: Sequence[Kind], margin: float, error: float) -> list[GateResult]:
    """Decide every kind of task, and every class with enough rows, within one error budget."""
    comparisons = []
    for kind in kinds:
        for name, score in kind.scores.items():
            comparisons.append(Comparison(f"{kind.name}: {name}", *scores_of(kind.rows, score), margin, is_set=True))
        if kind.has_classes:
            for label, count in sorted(Counter(row.expected for row in kind.rows).items()):
                if count >= SLICE_ROWS:
                    rows = [row for row in kind.rows if row.expected == label]
                    comparisons.append(Comparison(f"{kind.name}: {label}", *scores_of(rows, both(exact)), margin))
    return decide(comparisons, error, len(comparisons))


def verdict_of_all(gates: Sequence[GateResult]) -> str:
    """Return `worse` if anything is worse, `passed` if every kind of task passed, and `undecided` otherwise. A class that is
    undecided, as one with few rows is, holds nothing up."""
    if any(gate.verdict == WORSE for gate in gates):
        return WORSE
    return PASSED if all(gate.verdict == PASSED for gate in gates if gate.is_set) else UNDECIDED
