"""The text that stands for an image in place of what a chat template prints for it, before anything is tokenized: turns, masks,
lengths and packing are then those of any text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from dstune.data.images.places import is_place
from dstune.data.problems import RowError


@dataclass(frozen=True)
class Expanded:
    """A rendered text with its images."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) of each image."""
    ends: tuple[int, ...]
    """Behind each placeholder, in the text before."""
    grown: tuple[int, ...]
    """By how many characters the text is longer behind it."""

    def moved(self, at: int) -> int:
        """Return where the character `at` of the text before is now."""
        passed = bisect_right(self.ends, at)
        return at + (self.grown[passed - 1] if passed else 0)


def expand(text: str, placeholder: str, expansions: Sequence[str], expected: Sequence[int]) -> Expanded:
    """Return `text` with the first of `expansions` in place of the first `placeholder`, and so on.

    expected: how many the text may have: it may end behind any message. Raises RowError where it has another number.
    """
    pieces = text.split(placeholder)
    count = len(pieces) - 1
    if count not in expected:
        most = max(expected)
        raise RowError(
            f"the chat template prints {count} place{'s' * (count != 1)} ({placeholder}) for {most} image{'s' * (most != 1)}"
        )
    used = expansions[:count]
    written = [pieces[0]]
    spans, ends = [], []
    length, end = len(pieces[0]), len(pieces[0])
    for piece, expansion in zip(pieces[1:], used, strict=True):
        written += [expansion, piece]
        spans.append((length, length + len(expansion)))
        end += len(placeholder)
        ends.append(end)
        length += len(expansion) + len(piece)
        end += len(piece)
    grown = accumulate(len(expansion) - len(placeholder) for expansion in used)
    return Expanded("".join(written), tuple(spans), tuple(ends), tuple(grown))


def count_to(messages: Sequence[Mapping[str, Any]], last: int) -> list[int]:
    """Return how many images stand in a text that ends behind message `last` or a later one."""
    counts = [
        sum(map(is_place, content)) if isinstance(content := message.get("content"), list) else 0
        for message in messages
    ]
    return sorted(set(list(accumulate(counts))[last:]))
