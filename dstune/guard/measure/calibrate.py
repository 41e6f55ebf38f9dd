"""Computes thresholds from held-out benign texts, by direction and number of windows. The maximum of thirty scores is higher than a
single score, so each bucket of lengths has its own thresholds: from texts of that length, and from runs of as many neighbouring
windows in longer texts."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.guard.calibration import ATTACK, DIRECTIONS, LEVELS, Bucket, Calibration
from dstune.guard.model import LONG, GuardModel
from dstune.guard.variants import variants

BUCKETS = (1, 2, 4, 8, 16, 32, None)
"""The most windows of each bucket."""
FEWEST = 20
"""The fewest texts of a direction."""
CHUNK = 64
MOST_WINDOWS = 512
"""Assumed windows of the longest text for the last bucket, if no example is as long."""


@dataclass(frozen=True)
class Scored:
    """The scores of a benign text: of its windows in order, then of its variants' windows."""

    direction: str
    plain: tuple[float, ...]
    variants: tuple[float, ...]
    alone: tuple[float, ...]
    """Scores of the plain windows as they would be in a short text."""

    @property
    def all(self) -> tuple[float, ...]:
        return self.plain + self.variants


def calibrate(model: GuardModel, rows: Sequence[Mapping[str, Any]], source: str) -> Calibration:
    """Calibrate a model. rows: benign texts that it was not trained on, with `text` and `direction`. source: their name in
    messages. Raises UserError if a direction has too few rows with tokens, or a row is an attack."""
    check(rows, model.label, source)
    scored = list(_scores(model, rows))
    for direction in DIRECTIONS:
        count = sum(row.direction == direction and bool(row.all) for row in scored)
        if count < FEWEST:
            reason = f"only {count} texts with direction {direction} contain a token, and {FEWEST} are needed"
            raise UserError(Problem(source, reason, "give it texts as users and tools write them"))
    return thresholds(scored, model, rows, source)


def thresholds(scored: list[Scored], model: GuardModel, rows: Sequence[Mapping[str, Any]], source: str) -> Calibration:
    directions, counts = {}, {}
    for direction in DIRECTIONS:
        rows_of_direction = [scored_row for scored_row in scored if _counts(scored_row, direction)]
        directions[direction], used = _buckets(rows_of_direction)
        texts = [row["text"] for row in rows if row["direction"] == direction]
        counts[direction] = {
            "texts": len(texts),
            "digest": hashlib.sha256("\0".join(sorted(texts)).encode()).hexdigest(),
            "by_windows": used,
        }
    calibrated_on: dict[str, Any] = {"rows": source, "directions": counts}
    cut_and_label = (model.window_tokens, model.stride, model.label, model.part_tokens)
    return Calibration(model.digest, directions, calibrated_on, *cut_and_label)


def _counts(row: Scored, direction: str) -> bool:
    """Return whether a row counts in a direction. A long output or tool result counts in every direction. A user's text only counts
    as input: long requests are full of instructions, unlike documents."""
    return row.direction == direction or (row.direction != "input" and len(row.plain) >= LONG)


def check(rows: Sequence[Mapping[str, Any]], label: str, source: str) -> None:
    """Raises UserError if a direction has too few rows, or a row is an attack. label: the model's label of attacks."""
    problems = []
    attacks = sum(row.get("label") in (ATTACK, label) for row in rows)
    if attacks:
        reason = f"{attacks} of its rows are attacks; thresholds are set from benign texts"
        problems.append(Problem(source, reason, "take these rows out"))
    for direction in DIRECTIONS:
        count = sum(row.get("direction") == direction for row in rows)
        if count < FEWEST:
            reason = f"{count} texts have direction {direction}, and {FEWEST} are needed"
            problems.append(Problem(source, reason, f'rows as {{"text": ..., "direction": "{direction}"}}'))
    if problems:
        raise UserError(problems)


def _scores(model: GuardModel, rows: Sequence[Mapping[str, Any]]) -> Iterator[Scored]:
    started = reported = time.monotonic()
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        readings = [variants(row["text"]) for row in chunk]
        scores = iter(model.scores([reading.text for of_row in readings for reading in of_row]))
        for row, of_row in zip(chunk, readings, strict=True):
            plain, *others = [next(scores) for _ in of_row]
            yield Scored(
                row["direction"],
                tuple(reading.value for reading in plain),
                tuple(reading.value for row_scores in others for reading in row_scores),
                tuple(reading.alone for reading in plain),
            )
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            print(f"{start + len(chunk)} of {len(rows)} texts, {reported - started:.0f} s", file=sys.stderr, flush=True)


def _buckets(scored: Sequence[Scored]) -> tuple[tuple[Bucket, ...], dict[str, int]]:
    """Return the buckets, and the number of maxima behind the thresholds of each. Thresholds are made to rise with the number of
    windows. Texts shorter than any example get the shortest ones' thresholds; longer ones get the longest ones' at a lower rate: n
    times as many windows are n chances, as if they were independent."""
    maxima = [sorted(_maxima(scored, above or 0, up_to)) for above, up_to in zip((0, *BUCKETS), BUCKETS, strict=False)]
    nonempty_buckets = [number for number, highest in enumerate(maxima) if highest]
    buckets: list[Bucket] = []
    floor = dict.fromkeys(LEVELS.values(), 0.0)
    for number, up_to in enumerate(BUCKETS):
        measured = max((length for length in nonempty_buckets if length <= number), default=nonempty_buckets[0])
        share = (BUCKETS[measured] or MOST_WINDOWS) / (up_to or MOST_WINDOWS)
        for rate in floor:
            bucket_rate = rate if number <= measured else 1 - (1 - rate) ** share
            floor[rate] = max(floor[rate], threshold_at(maxima[measured], bucket_rate))
        buckets.append(Bucket(up_to, dict(floor)))
    names = (f"up_to_{up_to}" if up_to else "any" for up_to in BUCKETS)
    return tuple(buckets), dict(zip(names, map(len, maxima), strict=True))


def _maxima(scored: Iterable[Scored], above: int, up_to: int | None) -> Iterator[float]:
    """Yield the highest scores of texts with more than `above` and at most `up_to` windows: of complete texts, and of runs of
    windows in longer ones."""
    length = up_to or 2 * above
    for row in scored:
        if above < len(row.all) <= (up_to or math.inf):
            yield max(row.all)
        elif len(row.plain) > length and above:  # short texts are numerous enough without truncated ones
            windows = row.plain if length >= LONG else row.alone
            for start in range(0, len(windows) - length + 1, length):
                yield max(windows[start : start + length])


def fewest_texts(rate: float) -> int:
    """Return the number of texts from which `threshold_at` bounds a rate by more than the maximum score."""
    return math.ceil(1 / rate) - 1


def threshold_at(highest: Sequence[float], rate: float) -> float:
    """Return the lowest threshold at which at most `rate` of texts like these are alarms: the score after the k-th lowest of m with
    k = ceil((m + 1) (1 - rate)), as in conformal prediction (arXiv:2107.07511). Where m is too small for that, the score after the
    highest.

    highest: in rising order, at least one.
    """
    place = min(math.ceil((len(highest) + 1) * (1 - rate)), len(highest))
    return math.nextafter(highest[place - 1], math.inf)
