"""Check the tags of words, and convert the marks of entities to BIO."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from enum import Enum

from dstune.data.problems import RowError

OUTSIDE = "O"


class TagScheme(Enum):
    """What the tags of a task mean (`task.scheme`)."""

    auto = "auto"
    bio = "bio"
    plain = "plain"


_MARKED = re.compile(r"[BIESLUM]-.+", re.DOTALL)

AS_BIO = {"S": "B", "U": "B", "E": "I", "L": "I", "M": "I"}
"""Marks of BIOES and BILOU, and those of BIO that replace them without loss."""


def is_bio(tags: Collection[str]) -> bool:
    """Return whether all `tags` are `O` or mark a word of an entity (in BIO, BIOES or BILOU)."""
    return all(tag == OUTSIDE or _MARKED.fullmatch(tag) for tag in tags)


def marks_entities(labels: Collection[str], scheme: TagScheme) -> bool:
    """Return whether metrics count entities: the labels look like their marks, and the scheme is not plain tags of words."""
    return scheme is not TagScheme.plain and is_bio(labels)


def checked(tags: Sequence[str], tokens: Sequence[str], scheme: TagScheme, *, repair: bool) -> list[str]:
    """Return the tags of one sentence, with marks of entities in BIO (IOB2: every entity begins with B-).

    Marks of BIOES and BILOU become B- and I-. With `repair`, an I- tag that continues no entity of its type becomes B-,
    which turns IOB1 into IOB2. Raises RowError.
    """
    if scheme is TagScheme.plain or (scheme is TagScheme.auto and not is_bio(tags)):
        return list(tags)
    checked_tags = []
    tag_before = OUTSIDE
    for number, (tag, token) in enumerate(zip(tags, tokens, strict=True), start=1):
        if tag == OUTSIDE:
            checked_tags.append(tag)
            tag_before = tag
            continue
        if not _MARKED.fullmatch(tag):
            raise RowError(f"tag {tag!r} of word {number} ({token!r}) is neither O nor begins with B- or I-")
        mark, kind = tag[0], tag[2:]
        mark = AS_BIO.get(mark, mark)
        if mark == "I" and tag_before not in (f"B-{kind}", f"I-{kind}"):
            if not repair:
                follows = f"follows {tag_before!r}" if number > 1 else "is the first one"
                raise RowError(
                    f"tag {tag!r} of word {number} ({token!r}) continues no entity: it {follows}; "
                    "task.repair=true lets it begin one"
                )
            mark = "B"
        tag_before = f"{mark}-{kind}"
        checked_tags.append(tag_before)
    return checked_tags


def completed(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels completed to both marks of each type of entity and `O` (O, B-x, I-x, B-y, I-y, ...); other labels stay as
    they are."""
    if not is_bio(labels):
        return tuple(labels)
    kinds = sorted({label[2:] for label in labels if label != OUTSIDE})
    return (OUTSIDE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI"))
