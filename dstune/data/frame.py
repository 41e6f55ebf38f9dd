"""Put a tokenizer's special tokens around token ids, and cut long sequences into overlapping chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Tokens = list[tuple[int, int]]
"""Token ids, each with the text that it belongs to (`token_type_ids`; zeros if the tokenizer has none)."""


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around one text or a pair."""

    between: tuple[Tokens, ...]
    """The special tokens before the first text, between two, and after the last."""
    kinds: tuple[int, ...]
    """The token type of each text."""

    @classmethod
    def of(cls, tokenizer: Any, texts: int) -> Frame:
        """Learn the frame of one text, or of a pair (`texts` = 2), from an example."""
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
        """Put the frame around `texts`, each given as token ids. Return all token ids, their token types, and the index at which
        each text begins."""
        tokens: Tokens = list(self.between[0])
        starts = []
        for ids, kind, special_after in zip(texts, self.kinds, self.between[1:], strict=True):
            starts.append(len(tokens))
            tokens += [(token, kind) for token in ids]
            tokens += special_after
        return [token for token, _ in tokens], [kind for _, kind in tokens], starts


def chunks(length: int, size: int, stride: int, starts: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Return the [start, end) of chunks of at most `size` tokens that cover `length` tokens and overlap by `stride`.

    starts: ascending indices at which a chunk should begin, those of words. A chunk then begins at the first of them within its
    overlap, and with the full overlap if there is none.
    """
    assert 0 <= stride < size, "each chunk must advance"
    spans = [(0, min(size, length))]
    while spans[-1][1] < length:
        begin = spans[-1][1] - stride
        if starts is not None:
            begin = next((start for start in starts if begin <= start < spans[-1][1]), begin)
        spans.append((begin, min(begin + size, length)))
    return spans
