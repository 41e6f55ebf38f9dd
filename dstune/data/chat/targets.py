"""Turn the trained spans of characters into a mask of tokens, by the tokenizer's offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dstune.core.errors import Problem, UserError
from dstune.data.chat.rule import Span


def require_offsets(tokenizer: Any) -> None:
    """Check that the tokenizer can tell which characters each token stands for. Raises UserError otherwise."""
    if not tokenizer.is_fast:
        raise UserError(
            Problem(
                where="model.path",
                reason="the tokenizer gives no offsets, which task=chat needs to find the tokens to train on",
                fix="convert it to a tokenizer.json (a fast tokenizer)",
            )
        )


def target_mask(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Return which tokens contain characters of a span: bool [tokens].

    offsets: first and last character (exclusive) of each token, [tokens, 2]; spans: sorted and disjoint. A token that
    crosses the edge of a span counts: leaving it out would lose characters that the assistant wrote.
    """
    if not spans or not len(offsets):
        return np.zeros(len(offsets), dtype=bool)
    starts, ends = np.array(spans).T
    first, last = offsets[:, 0], offsets[:, 1]
    # Only one span can contain a token: the first that ends after the token's first character.
    nearest = np.searchsorted(ends, first, side="right")
    inside = nearest < len(ends)
    nearest = np.minimum(nearest, len(ends) - 1)
    # Some tokenizers trim white space from the offsets: a token of white space alone is then empty, and still counts.
    return inside & np.where(last > first, last > starts[nearest], first >= starts[nearest])
