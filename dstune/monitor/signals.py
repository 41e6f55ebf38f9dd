"""The signals by which two sides of conversations are compared, grouped by shared permutations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dstune.core.errors import UserError
from dstune.monitor import effects
from dstune.monitor.conversations import Conversation
from dstune.monitor.effects import Effect
from dstune.monitor.two_sample import CategoryShares, DomainClassifier, LargestGap, MeanDiscrepancy, Statistic

FEWEST = 20
"""A signal is only compared if each side has at least this many conversations with a value."""
EMBEDDINGS, CLASSIFIER = "embeddings", "classifier"
FOLDS = 5


@dataclass(frozen=True)
class Signal:
    """One measurement of every conversation that has it."""

    name: str
    against: str
    """What the live rows are compared with."""
    values: np.ndarray
    """Vectors float32 [rows, dimensions], numbers [rows] or texts [rows]: reference rows first, then the live ones."""
    is_live: np.ndarray
    rows: tuple[int, ...]
    """Indices of the conversations; signals with the same ones share their permutations."""
    first_live: int
    """Index of the first live conversation."""

    @property
    def kind(self) -> str:
        return "vectors" if self.values.ndim == 2 else "category" if self.values.dtype.kind == "U" else "number"

    def statistics(self, seed: int) -> dict[str, Statistic]:
        """Return the statistics by name; vectors have two."""
        if self.kind == "vectors":
            discrepancy = MeanDiscrepancy(self.values, seed)
            return {EMBEDDINGS: discrepancy, CLASSIFIER: DomainClassifier(self.values)}
        return {self.name: LargestGap(self.values) if self.kind == "number" else CategoryShares(self.values)}

    def effect(self) -> Effect:
        """Return the size of the difference between the two sides."""
        live, reference = self.values[self.is_live], self.values[~self.is_live]
        if self.kind == "vectors":
            return classifier_effect(self.values, self.is_live)
        return effects.auc(live, reference) if self.kind == "number" else effects.largest_share_change(live, reference)

    def psi(self) -> float | None:
        return effects.psi(self.values[self.is_live], self.values[~self.is_live]) if self.kind == "number" else None


def classifier_effect(vectors: np.ndarray, is_live: np.ndarray) -> Effect:
    """Return the AUC of the domain classifier on rows that it was not fitted on, as the mean over FOLDS parts."""
    effects_of_parts = []
    for part in folds(is_live):
        scores = fold_scores(vectors, is_live, part)
        effects_of_parts.append(effects.auc(scores[is_live[part]], scores[~is_live[part]]))
    value = float(np.mean([effect.value for effect in effects_of_parts]))
    half_widths = [(effect.high - effect.low) / 2 for effect in effects_of_parts]
    half_width = float(np.sqrt(np.sum([width**2 for width in half_widths])) / len(half_widths))
    return Effect("auc", value, max(0.0, value - half_width), min(1.0, value + half_width))


def folds(is_live: np.ndarray) -> list[np.ndarray]:
    """Return the row numbers of FOLDS parts, each with rows of both sides."""
    sides = [np.random.default_rng(0).permutation(np.flatnonzero(side)) for side in (is_live, ~is_live)]
    return [np.sort(np.concatenate([side[part::FOLDS] for side in sides])) for part in range(FOLDS)]


def fold_scores(vectors: np.ndarray, is_live: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the scores of the rows `part`, [len(part)], by a ridge classifier fitted on the other rows."""
    others = np.setdiff1d(np.arange(len(vectors)), part)
    mean = vectors[others].mean(axis=0)
    centred = (vectors[others] - mean).astype(np.float64)
    target = is_live[others] - is_live[others].mean()
    products = centred.T @ centred
    penalty = max(float(np.trace(products)) / len(products), 1e-12)
    weights = np.linalg.solve(products + penalty * np.eye(len(products)), centred.T @ target)
    return np.asarray((vectors[part] - mean) @ weights)


class SignalTable:
    """Collects the signals of a check, and the reasons why others could not be compared."""

    def __init__(self) -> None:
        self.signals: list[Signal] = []
        self.unmeasured: dict[str, str] = {}

    def add(self, name: str, against: str, reference: np.ndarray, live: np.ndarray) -> None:
        """Add a signal. reference, live: one value for each conversation of the side; NaN or "" if it has none."""
        values = np.concatenate([reference, live])
        is_live = np.arange(len(values)) >= len(reference)
        is_measured = (
            values != "" if values.dtype.kind == "U" else np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        )
        counts = int(np.sum(is_measured & is_live)), int(np.sum(is_measured & ~is_live))
        if min(counts) < FEWEST:
            self.unmeasured[name] = (
                f"only {counts[0]} live and {counts[1]} reference rows have a value, of {FEWEST} needed on each side"
            )
        elif values.ndim == 1 and len(np.unique(values[is_measured])) < 2:
            self.unmeasured[name] = f"all rows have the same value, {values[is_measured][0]}"
        else:
            rows = tuple(np.flatnonzero(is_measured).tolist())
            self.signals.append(Signal(name, against, values[is_measured], is_live[is_measured], rows, len(reference)))

    def families(self) -> list[list[Signal]]:
        """Return the signals grouped by the rows that have them."""
        groups: dict[tuple[str, tuple[int, ...]], list[Signal]] = {}
        for signal in self.signals:
            groups.setdefault((signal.against, signal.rows), []).append(signal)
        return [*groups.values()]


def add_text_signals(
    table: SignalTable, reference: Sequence[Conversation], live: Sequence[Conversation], against: str
) -> None:
    """Add the signals of text: length, number of turns, and language."""
    for name, measure in (("characters", _characters), ("turns", _turns)):
        table.add(
            name,
            against,
            np.array([measure(conversation) for conversation in reference]),
            np.array([measure(conversation) for conversation in live]),
        )
    try:
        from dstune.data.clean.language import language

        languages = [np.array([language(conversation.text)[0] for conversation in side]) for side in (reference, live)]
    except UserError as error:
        table.unmeasured["language"] = str(error.problems[0].reason)
        return
    table.add("language", against, *languages)


def _characters(conversation: Conversation) -> float:
    """Return the logarithm of the length, since lengths span orders of magnitude."""
    return math.log1p(len(conversation.text))


def _turns(conversation: Conversation) -> float:
    return float(len(conversation.texts))


def labels(conversations: Sequence[Conversation]) -> np.ndarray:
    """Return the label of each conversation; "" if it has none."""
    return np.array([conversation.label or "" for conversation in conversations], dtype=np.str_)


def add_outcomes(
    table: SignalTable, earlier: Sequence[Conversation], live: Sequence[Conversation], against: str
) -> None:
    """Add ratings and the guard's flags, which training rows lack."""
    for name, measure in (("rating", _rating), ("guard flags", _flag)):
        sides = [
            np.array([measure(conversation) for conversation in side], dtype=np.float64) for side in (earlier, live)
        ]
        if any(np.isfinite(side).any() for side in sides):
            table.add(name, against, *sides)


def _rating(conversation: Conversation) -> float:
    return math.nan if conversation.rating is None else conversation.rating


def _flag(conversation: Conversation) -> float:
    return math.nan if conversation.is_flagged is None else float(conversation.is_flagged)


def by_time(conversations: Sequence[Conversation]) -> np.ndarray | None:
    """Return the order of the conversations by time; None unless all have a time."""
    times = [conversation.time for conversation in conversations]
    return None if any(time is None for time in times) else np.argsort(np.array(times, dtype=np.float64), kind="stable")
