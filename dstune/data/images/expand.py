"""Replace the placeholder that a chat template prints for an image by the image's tokens, as text, before tokenization.

Turns, masks, lengths and packing then work as for any text.
"""

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
    """A rendered text with its placeholders expanded."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters [start, end) of each image in `text`."""
    ends: tuple[int, ...]
    """End of each placeholder in the original text."""
    grown: tuple[int, ...]
    """By how many characters the text up to the end of each placeholder has grown."""

    def moved(self, at: int) -> int:
        """Return the place in `text` of the character `at` of the original text."""
        passed = bisect_right(self.ends, at)
        return at + (self.grown[passed - 1] if passed else 0)


def expand(text: str, placeholder: str, expansions: Sequence[str], expected: Sequence[int]) -> Expanded:
    """Return `text` with the first of `expansions` in place of the first `placeholder`, and so on.

    expected: the possible numbers of placeholders, since the text may end after any message. Raises RowError for other numbers.
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
    """Return the possible numbers of images in a text that ends after message `last` or a later one, ascending."""
    counts = [
        sum(map(is_place, content)) if isinstance(content := message.get("content"), list) else 0
        for message in messages
    ]
    return sorted(set(list(accumulate(counts))[last:]))
