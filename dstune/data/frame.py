"""The special tokens that a tokenizer puts around a text and between two, to be put around token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Tokens = list[tuple[int, int]]
"""Token ids with the text that each belongs to (`token_type_ids`; zeros where the tokenizer has none)."""


@dataclass(frozen=True)
class Frame:
    between: tuple[Tokens, ...]
    """What comes before the first text, between two, and after the last."""
    kinds: tuple[int, ...]
    """The token type of each text."""

    @classmethod
    def of(cls, tokenizer: Any, texts: int) -> Frame:
        """Make the frame of a text alone, or of a pair (`texts` = 2)."""
        example = tokenizer(*["a"] * texts)
        types = example.get("token_type_ids", [0] * len(example["input_ids"]))
        remaining = list(zip(example["input_ids"], types, strict=True))
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        between, kinds = [], []
        for _ in range(texts):
            start = next(
                at for at in range(len(remaining)) if [token for token, _ in remaining[at : at + len(plain)]] == plain
            )
            between.append(remaining[:start])
            kinds.append(remaining[start][1])
            remaining = remaining[start + len(plain) :]
        return cls((*between, remaining), tuple(kinds))

    @property
    def size(self) -> int:
        """Number of special tokens."""
        return sum(map(len, self.between))

    def around(self, texts: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
        """Put the frame around `texts` (token ids of each). Returns the token ids of the whole, their token types, and the place at
        which each text begins."""
        tokens: Tokens = list(self.between[0])
        starts = []
        for ids, kind, behind in zip(texts, self.kinds, self.between[1:], strict=True):
            starts.append(len(tokens))
            tokens += [(token, kind) for token in ids]
            tokens += behind
        return [token for token, _ in tokens], [kind for _, kind in tokens], starts


def chunks(length: int, size: int, stride: int, starts: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Return where chunks of at most `size` tokens begin and end that cover `length` tokens, neighbours having `stride` in common.

    starts: places where a chunk may begin, ascending (words); the next one is taken, and any place where none is near.
    """
    assert 0 <= stride < size, "chunks must get ahead"
    spans = [(0, min(size, length))]
    while spans[-1][1] < length:
        begin = spans[-1][1] - stride
        if starts is not None:
            begin = next((start for start in starts if begin <= start < spans[-1][1]), begin)
        spans.append((begin, min(begin + size, length)))
    return spans
