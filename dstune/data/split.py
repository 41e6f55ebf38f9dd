"""Hold rows out by a hash of their content: equal rows stay together, and the order of rows does not matter."""

from __future__ import annotations

import numpy as np
import xxhash

TRAIN, VALIDATION, TEST = 0, 1, 2

SHARE, FEWEST, LARGEST_SHARE = 0.05, 20, 0.2
"""Of `data.split.validation=auto`: the usual share of held-out rows, their minimum number, and their maximum share."""

MANY = int(FEWEST / SHARE)
"""From this number of rows on, only SHARE decides."""


def automatic_share(hashes: np.ndarray, *, labelled: bool) -> tuple[float, int]:
    """Return the share of `data.split.validation=auto`, and the number of rows that it holds out.

    hashes: uint64 [rows]; equal rows count once. For rows without labels, the share lies in the middle between the hashes of the
    last held-out row and the next one (as a fraction of 2**64), so that `assign` holds out exactly these rows, also if others
    are added.
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
    """Return the 64-bit hash of a row's content under the split's seed."""
    return xxhash.xxh3_64_intdigest(content, seed=seed & 0xFFFFFFFFFFFFFFFF)


def assign(hashes: np.ndarray, labels: np.ndarray | None, *, validation: float, test: float) -> np.ndarray:
    """Return the part of each row: TRAIN, VALIDATION or TEST, int8 [rows].

    hashes: uint64 [rows], from `content_hash`; labels: any dtype [rows], or None. Shares are in [0, 1).

    Without labels, a row's part depends only on its own hash. With labels, each label gives the same share of its rows (those
    with the lowest hashes) and keeps at least one for training. A share above 0 holds out at least one row, if there are two
    different ones.
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
    # The rank of a row is the number of rows with a lower hash. Equal rows have the same rank, so they stay together.
    rank = np.searchsorted(hashes[ranked], hashes[ranked], side="left")
    first = round(validation * len(ranked))
    second = first + round(test * len(ranked))
    chosen = np.where(rank < first, VALIDATION, np.where(rank < second, TEST, TRAIN))
    if not np.any(chosen == TRAIN):
        chosen[rank == rank[-1]] = TRAIN
    parts[ranked] = chosen


def _hold_out_one(parts: np.ndarray, hashes: np.ndarray, labels: np.ndarray, part: int) -> None:
    """Move the training row with the lowest hash (and its equals) to `part`, but never the last row of a label."""
    training = parts == TRAIN
    for candidate in np.unique(hashes[training]):
        moved = training & (hashes == candidate)
        staying = training & ~moved
        if np.isin(labels[moved], labels[staying]).all():
            parts[moved] = part
            return


def lowest(hashes: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` rows with the lowest hashes, ascending: a sample that is always the same."""
    chosen = np.argsort(hashes, kind="stable")[:count]
    return np.sort(chosen)
