"""A tokenized sample as pieces of text that say whether they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dstune.data.collate import NO_TARGET
from dstune.data.tags import OUTSIDE, is_bio

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
    tag: str = ""
    """What kind of entity they are, or which part of speech; nothing where no tag says so."""


@dataclass(frozen=True)
class Turn:
    """A target, and what the model reads since the one before it."""

    context: list[Segment]
    target: list[Segment]

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, pieces in (("context", self.context), ("target", self.target)):
            fields[name] = "".join(piece.text for piece in pieces)
            fields[f"{name}_tokens"] = sum(piece.tokens for piece in pieces)
        return fields


def turns(pieces: Sequence[Segment]) -> tuple[list[Turn], list[Segment]]:
    """Return the turns of a sample, and what stands behind the last target."""
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
    """Return the sample in pieces, whose texts joined are the sample's text with its special tokens.

    labels: as of a sample, NO_TARGET where a token does not count; None where none does (classification).
    names: those of the tags that the labels are the indices of (token classification). Then a piece is an entity, or a
    word with its tag, and such pieces are the trained ones.
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
"""Equal special tokens from which on they are shown as one: an image may be a thousand of them."""


def joined_repeats(pieces: Sequence[Segment]) -> list[Segment]:
    """Return the pieces with runs of the same special token as one piece that says how many they are."""
    joined: list[Segment] = []
    for (special, text, trained), run in groupby(pieces, key=lambda piece: (piece.special, piece.text, piece.trained)):
        group = list(run)
        if special and len(group) >= LEAST_REPEATS:
            group = [Segment(f"{text} x {len(group)} ", len(group), trained, special=True)]
        joined += group
    return joined


def _entities(special: list[bool], labels: Sequence[int], names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return for each token the kind that its tag names, and the number of the piece that it belongs to."""
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
    # What a special token does to its surroundings is its own affair; only plain text in front matters.
    context_start = next(
        (at + 1 for at in range(start - 1, context_start - 1, -1) if ids[at] in special), context_start
    )
    context, whole = _decode(tokenizer, ids[context_start:start]), _decode(tokenizer, ids[context_start:end])
    # A character cut in two by the boundary decodes to another text alone.
    return whole[len(context) :] if whole.startswith(context) else _decode(tokenizer, ids[start:end])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
