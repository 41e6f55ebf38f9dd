"""Find label names that look like slips: almost equal to another label, or with a single row."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations

from dstune.core.errors import Problem, UserError

SHORTEST = 4
"""Length from which two words of labels that differ by one edit count as a slip: many shorter ones do (`cat` and `bat`)."""

_MARK = re.compile(r"[BIESLUM]-(?=.)")
_WORDS = re.compile(r"[\W_]+")


def suspicious(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each label that looks like a slip. counts: training rows by label.

    Marks of entities (`B-`, `I-`) are no part of a name: `B-PER` and `I-PER` count as one label.
    """
    names: dict[str, int] = {}
    for label, count in counts.items():
        name = _MARK.sub("", label, count=1)
        names[name] = names.get(name, 0) + count
    return [
        *_alike(names),
        *(f"the label {name!r} has one training row" for name, count in names.items() if count == 1),
    ]


def refuse_suspicious(counts: Mapping[str, int]) -> None:
    """Raise UserError with every label that looks like a slip (`data.on_suspicious_labels=error`)."""
    fix = "fix the rows, or data.on_suspicious_labels=list trains on them as they are"
    if reasons := suspicious(counts):
        raise UserError([Problem("data.train", reason, fix) for reason in reasons])


def _alike(names: Mapping[str, int]) -> Iterator[str]:
    for first, second in _candidates(names):
        difference = _difference(first, second)
        if difference:
            few, many = sorted((first, second), key=lambda name: names[name])
            yield f"the labels {few!r} ({_rows(names[few])}) and {many!r} ({_rows(names[many])}) differ by {difference} only"


def _candidates(names: Collection[str]) -> list[tuple[str, str]]:
    """Return the pairs that may differ by one edit: with at most one character left out, both give the same text.

    Comparing all pairs would take too long with thousands of labels.
    """
    by_text: dict[str, list[str]] = defaultdict(list)
    for name in names:
        compact = "".join(_WORDS.split(unicodedata.normalize("NFKC", name).casefold()))
        for text in {compact, *(compact[:at] + compact[at + 1 :] for at in range(len(compact)))}:
            by_text[text].append(name)
    return list(dict.fromkeys(pair for alike in by_text.values() for pair in combinations(alike, 2)))


def _rows(count: int) -> str:
    return f"{count:,} training row{'s' * (count != 1)}"


def _difference(first: str, second: str) -> str:
    """Return how the two differ if the difference is small; otherwise an empty text."""
    first_name, second_name = (unicodedata.normalize("NFKC", name) for name in (first, second))
    if first_name.casefold() == second_name.casefold():
        return "case" if first_name != second_name else "the form of a character"
    words, others = ([word for word in _WORDS.split(name.casefold()) if word] for name in (first_name, second_name))
    if "".join(words) == "".join(others) and words:
        return "white space or punctuation"
    if len(words) != len(others):
        return ""
    unlike = [(a, b) for a, b in zip(words, others, strict=True) if a != b]
    return "one character" if len(unlike) == 1 and _is_slip(*unlike[0]) else ""


def _is_slip(first: str, second: str) -> bool:
    """Return whether `first` becomes `second` by one letter added, removed or replaced, or two neighbours swapped. A different
    number, as in `class10`, is no slip."""
    if min(len(first), len(second)) < SHORTEST or any(letter.isdigit() for letter in first + second):
        return False
    short, long = sorted((first, second), key=len)
    start = next((at for at, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    if len(long) - len(short) > 1:
        return False
    if len(long) > len(short):
        return short[start:] == long[start + 1 :]
    swapped = short[start : start + 2] == long[start : start + 2][::-1] and short[start + 2 :] == long[start + 2 :]
    return short[start + 1 :] == long[start + 1 :] or swapped
