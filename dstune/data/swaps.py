"""Swap the terms of a user's table, to measure how much a model's answers depend on them (`evaluate.counterfactual`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.data import sources
from dstune.data.clean.rows import Row, map_texts, texts

KEY = "evaluate.counterfactual"


class Swaps:
    """Replaces each term by its counterpart, in both directions; if it has several, by the first.

    Terms match as whole words in upper or lower case, longer terms first. A capital first letter, or all capitals, are
    preserved. Example for the pair (he, she): "He told her" becomes "She told her", "SHE" becomes "HE".
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        self._other: dict[str, str] = {}
        for first, second in pairs:
            self._other.setdefault(first.lower(), second)
        for first, second in pairs:
            self._other.setdefault(second.lower(), first)
        longest_first = sorted((term for pair in pairs for term in pair), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)

    @classmethod
    def read(cls, path: str) -> Swaps:
        """Read swaps from a file of rows with the columns `from` and `to`. Raises UserError."""
        return cls(read_pairs(path, KEY, {"from": "he", "to": "she"}))

    def text(self, text: str) -> str:
        return self._pattern.sub(self._swapped, text)

    def _swapped(self, match: re.Match[str]) -> str:
        # The pattern also matches a dotless or a dotted capital I as i, and a long s as s: these are other words.
        other = self._other.get(match.group().lower())
        return match.group() if other is None else cased(other, match.group())

    def row(self, row: Row) -> Row | None:
        """Return the normalised `row` with its terms swapped; None if it has none, or if the swap broke an answer's span."""
        swapped = map_texts(row, self.text)
        return None if swapped == row or swapped.get("context") == "" else swapped

    def names(self, row: Row) -> list[str]:
        """Return the swaps in `row` as `he -> she`, sorted."""
        terms = {
            match.group().lower() for text in row.get("tokens", texts(row)) for match in self._pattern.finditer(text)
        }
        return sorted(f"{term} -> {self._other[term].lower()}" for term in terms & self._other.keys())


def read_pairs(path: str, key: str, example: dict[str, str]) -> list[tuple[str, str]]:
    """Read pairs from a file of rows with the two columns of `example`. Raises UserError."""
    first, second = example
    columns = f"the columns {first!r} and {second!r}"
    pairs, problems = [], []
    for file in sources.expand(path, key):
        for raw in sources.read(file):
            terms = [(raw.fields or {}).get(name) for name in example]
            if all(isinstance(term, str) and term.strip() for term in terms):
                pairs.append((str(terms[0]).strip(), str(terms[1]).strip()))
            else:
                reason = raw.error or f"a row needs two terms, in {columns}"
                problems.append(Problem(raw.place, reason, f"for example {json.dumps(example)}"))
    if problems:
        raise UserError(problems[:10])
    if not pairs:
        raise UserError(Problem(key, "the table has no rows", f"give rows with {columns}", path))
    return pairs


def cased(term: str, like: str) -> str:
    """Return `term` with a capital first letter, or all capitals, if `like` has them."""
    if len(like) > 1 and like.isupper():
        return term.upper()
    return term[:1].upper() + term[1:] if like[:1].isupper() else term


def slice_values(fields: dict[str, Any], columns: Sequence[str]) -> dict[str, str | None]:
    """Return the row's value of each column in `evaluate.slices` as text; None if it has none."""
    value_by_column: dict[str, str | None] = {}
    for column in columns:
        value = fields.get(column)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        value_by_column[column] = None if value is None or isinstance(value, list | dict) else str(value)
    return value_by_column
