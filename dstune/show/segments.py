"""A tokenized sample as pieces of text that say whether they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dstune.data.collate import NO_TARGET

CONTEXT_TOKENS = 8
"""Tokens decoded in front of a piece, so that it keeps the space that a tokenizer drops at the start of a text."""


@dataclass(frozen=True)
class Segment:
    """Tokens that follow each other and are alike."""

    text: str
    tokens: int
    trained: bool
    """Whether they count in the loss."""
    special: bool
    """Whether they are a special token of the model (such a segment is one token)."""


def segments(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int] | None) -> list[Segment]:
    """The sample in pieces, whose texts joined are the sample's text with its special tokens.

    labels: as of a sample, NO_TARGET where a token does not count; None where none does (classification).
    """
    ids = [int(token) for token in input_ids]
    targets = [False] * len(ids) if labels is None else [int(label) != NO_TARGET for label in labels]
    special = {*tokenizer.all_special_ids}
    special |= {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
    pieces = []
    start = 0
    while start < len(ids):
        end = start + 1
        alone = ids[start] in special
        while not alone and end < len(ids) and targets[end] == targets[start] and ids[end] not in special:
            end += 1
        text = tokenizer.convert_ids_to_tokens(ids[start]) if alone else _text(tokenizer, ids, start, end, special)
        pieces.append(Segment(text, end - start, targets[start], alone))
        start = end
    return pieces


def _text(tokenizer: Any, ids: list[int], start: int, end: int, special: set[int]) -> str:
    before = max(0, start - CONTEXT_TOKENS)
    # What a special token does to its surroundings is its own affair; only plain text in front matters.
    before = next((at + 1 for at in range(start - 1, before - 1, -1) if ids[at] in special), before)
    context, whole = _decode(tokenizer, ids[before:start]), _decode(tokenizer, ids[before:end])
    # A character cut in two by the boundary decodes to another text alone.
    return whole[len(context) :] if whole.startswith(context) else _decode(tokenizer, ids[start:end])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
