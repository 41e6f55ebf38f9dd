"""Hold rows out by a hash of their content: equal rows stay together, and no other row's order matters."""

from __future__ import annotations

import numpy as np
import xxhash

TRAIN, VALIDATION, TEST = 0, 1, 2

SHARE, FEWEST, LARGEST_SHARE = 0.05, 20, 0.2
"""Of `data.split.validation=auto`: the share that is held out, the rows that are at least, and the share that is at most."""

MANY = int(FEWEST / SHARE)
"""From this number of rows on, the share alone decides."""


def automatic_share(hashes: np.ndarray, *, labelled: bool) -> tuple[float, int]:
    """Return the share of `data.split.validation=auto`, and how many of the rows it holds out.

    hashes: uint64 [rows]; equal rows count once. Of rows without labels the share is the place, among all hashes, between the
    last row that is held out and the next one: it holds out the same rows when others are added.
    """
    ranked = np.unique(hashes)
    count = len(ranked)
    if count >= MANY or count < 2:
        return SHARE, round(SHARE * count)
    held_out = max(1, min(FEWEST, int(LARGEST_SHARE * count)))
    if labelled:
        return held_out / count, held_out
    return (float(ranked[held_out - 1]) + float(ranked[held_out])) / 2.0**65, held_out


def content_hash(content: bytes, seed: int) -> int:
    """Return 64-bit hash of a row's content under the split's seed."""
    return xxhash.xxh3_64_intdigest(content, seed=seed & 0xFFFFFFFFFFFFFFFF)


def assign(hashes: np.ndarray, labels: np.ndarray | None, *, validation: float, test: float) -> np.ndarray:
    """Return which part each row belongs to: TRAIN, VALIDATION or TEST, int8 [rows].

    hashes: uint64 [rows], from `content_hash`; labels: any dtype [rows], or None. Shares are in [0, 1).

    Without labels a row's part depends on its own hash alone. With labels, every label gives the same share of its own
    rows (those with the lowest hashes) and keeps at least one for training. A share above 0 holds out one row
    at least, if there are two different ones.
    """
    parts = np.zeros(len(hashes), dtype=np.int8)
    if labels is None:
        position = hashes / 2.0**64
        parts[position < validation + test] = TEST
        parts[position < validation] = VALIDATION
        if len(hashes) and not np.any(parts == TRAIN):
            parts[hashes == hashes.max()] = TRAIN
    else:
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            _assign_ranked(parts, hashes, members, validation, test)
    for part, share in ((VALIDATION, validation), (TEST, test)):
        if share > 0 and not np.any(parts == part):
            _hold_out_one(parts, hashes, np.zeros(len(hashes)) if labels is None else labels, part)
    return parts


def _assign_ranked(parts: np.ndarray, hashes: np.ndarray, members: np.ndarray, validation: float, test: float) -> None:
    ranked = members[np.argsort(hashes[members], kind="stable")]
    # Rank of a row = number of rows with a lower hash, the same for equal rows, so these never part.
    rank = np.searchsorted(hashes[ranked], hashes[ranked], side="left")
    first = round(validation * len(ranked))
    second = first + round(test * len(ranked))
    chosen = np.where(rank < first, VALIDATION, np.where(rank < second, TEST, TRAIN))
    if not np.any(chosen == TRAIN):
        chosen[rank == rank[-1]] = TRAIN
    parts[ranked] = chosen


def _hold_out_one(parts: np.ndarray, hashes: np.ndarray, labels: np.ndarray, part: int) -> None:
    """Move the training row with the lowest hash (and its equals), but never the last one of a label."""
    training = parts == TRAIN
    for candidate in np.unique(hashes[training]):
        moved = training & (hashes == candidate)
        staying = training & ~moved
        if np.isin(labels[moved], labels[staying]).all():
            parts[moved] = part
            return


def lowest(hashes: np.ndarray, count: int) -> np.ndarray:
    """Return indices of the `count` rows with the lowest hashes, in their old order: a sample that is always the same."""
    chosen = np.argsort(hashes, kind="stable")[:count]
    return np.sort(chosen)
