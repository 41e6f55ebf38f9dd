"""Splits a tokenized sample into pieces of text, each with a mark whether it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dstune.data.collate import NO_TARGET
from dstune.data.tags import OUTSIDE, is_bio

CONTEXT_TOKENS = 8
"""Tokens that are decoded before a piece, so that the piece keeps the space that a tokenizer drops at the start of a text."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that are alike: trained or not, special or not, of one tag."""

    text: str
    tokens: int
    trained: bool
    """Whether they count in the loss."""
    special: bool
    """Whether this is a special token of the model (such a segment has one token)."""
    tag: str = ""
    """The kind of entity, or the part of speech; empty without a tag."""


@dataclass(frozen=True)
class Turn:
    """A target, and the context that the model reads since the target before it."""

    context: list[Segment]
    target: list[Segment]

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, pieces in (("context", self.context), ("target", self.target)):
            fields[name] = "".join(piece.text for piece in pieces)
            fields[f"{name}_tokens"] = sum(piece.tokens for piece in pieces)
        return fields


def turns(pieces: Sequence[Segment]) -> tuple[list[Turn], list[Segment]]:
    """Return the turns of a sample, and what follows the last target."""
    turns_in_order: list[Turn] = []
    context: list[Segment] = []
    for trained, group in groupby(pieces, key=lambda piece: piece.trained):
        if trained:
            turns_in_order.append(Turn(context, list(group)))
            context = []
        else:
            context = list(group)
    return turns_in_order, context


def segments(tokenizer: Any, input_ids: Sequence[int], labels: Any, names: Sequence[str] = ()) -> list[Segment]:
    """Return the sample in pieces. Their texts, joined, are the sample's text with its special tokens.

    labels: the sample's labels, NO_TARGET for tokens that do not count in the loss; None if no token does (classification).
    names: the tags that the labels index (token classification). Then each trained piece is an entity, or a word with its tag.
    """
    ids = [int(token) for token in input_ids]
    targets = [False] * len(ids) if labels is None else [int(label) != NO_TARGET for label in labels]
    special = {*tokenizer.all_special_ids}
    special |= {number for number, added in tokenizer.added_tokens_decoder.items() if added.special}
    groups = list(map(int, targets))
    kinds = [""] * len(ids)
    if names:
        assert labels is not None, "tags are labels of tokens"
        kinds, groups = _entities([token in special for token in ids], labels, names)
        targets = [bool(kind) for kind in kinds]
    pieces = []
    start = 0
    while start < len(ids):
        end = start + 1
        alone = ids[start] in special
        while not alone and end < len(ids) and groups[end] == groups[start] and ids[end] not in special:
            end += 1
        text = tokenizer.convert_ids_to_tokens(ids[start]) if alone else _text(tokenizer, ids, start, end, special)
        pieces.append(Segment(text, end - start, targets[start], alone, kinds[start]))
        start = end
    return pieces


LEAST_REPEATS = 3
"""From this many on, equal special tokens in a row are shown as one piece: an image may be a thousand of them."""


def joined_repeats(pieces: Sequence[Segment]) -> list[Segment]:
    """Return the pieces with each run of the same special token as one piece, which says how many there are."""
    joined: list[Segment] = []
    for (special, text, trained), run in groupby(pieces, key=lambda piece: (piece.special, piece.text, piece.trained)):
        group = list(run)
        if special and len(group) >= LEAST_REPEATS:
            group = [Segment(f"{text} x {len(group)} ", len(group), trained, special=True)]
        joined += group
    return joined


def _entities(special: list[bool], labels: Sequence[int], names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the kind of entity of each token, and the number of the piece that each token belongs to."""
    kinds, groups = [], []
    kind, group = "", 0
    for is_special, label in zip(special, labels, strict=True):
        if is_special:
            kind, group = "", group + 1
        elif int(label) != NO_TARGET:
            tag = names[int(label)]
            entity_kind = "" if tag == OUTSIDE else tag[2:] if is_bio([tag]) else tag
            if not (entity_kind == kind and (tag.startswith("I-") or not entity_kind)):
                group += 1
            kind = entity_kind
        # A token without a label is a later part of its word.
        kinds.append(kind)
        groups.append(group)
    return kinds, groups


def _text(tokenizer: Any, ids: list[int], start: int, end: int, special: set[int]) -> str:
    context_start = max(0, start - CONTEXT_TOKENS)
    # The context starts after the last special token: only ordinary text decides about the space before the piece.
    context_start = next(
        (at + 1 for at in range(start - 1, context_start - 1, -1) if ids[at] in special), context_start
    )
    context, whole = _decode(tokenizer, ids[context_start:start]), _decode(tokenizer, ids[context_start:end])
    # If the boundary cuts a character in two, the context alone decodes differently: the piece is then decoded by itself.
    return whole[len(context) :] if whole.startswith(context) else _decode(tokenizer, ids[start:end])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
