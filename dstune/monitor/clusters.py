"""Finds which rows drift: topics that have grown, examples of them, and when the change began."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dstune.monitor.conversations import Conversation
from dstune.monitor.effects import Effect, share_change
from dstune.monitor.signals import fold_scores, folds

TOPICS = 12
MOST_SHOWN = 3
EXAMPLES = 5
PRIVATE = 10
"""Users (or conversations, if users are unknown) that must share a word before it is shown: with fewer, it could identify them."""
WORDS = 8
SHARP = 4.0
"""Standard errors that a step in the classifier's scores must exceed: the best of many places reaches 3 by chance."""
_WORD = re.compile(r"\w{3,}")


@dataclass(frozen=True)
class Cluster:
    """A topic whose share of the live rows exceeds its share of the reference rows."""

    live_share: float
    reference_share: float
    change: Effect
    examples: tuple[int, ...]
    """Indices of live conversations, the most typical first."""
    words: tuple[str, ...]


def grown_clusters(
    vectors: np.ndarray, is_live: np.ndarray, live: Sequence[Conversation], seed: int = 0
) -> list[Cluster]:
    """Return the topics that have certainly grown, those that grew most first. vectors: [reference and live rows, dimensions]."""
    from sklearn.cluster import KMeans

    model = KMeans(min(TOPICS, len(vectors) // 5), n_init=2, random_state=seed).fit(vectors)
    topics = model.labels_
    clusters = []
    first_live = int(np.flatnonzero(is_live)[0])
    for topic, centre in enumerate(model.cluster_centers_):
        live_share, reference_share = (
            float(np.mean(topics[is_live] == topic)),
            float(np.mean(topics[~is_live] == topic)),
        )
        change = share_change(live_share, len(live), reference_share, len(vectors) - len(live))
        if change.low <= 0:
            continue
        members = np.flatnonzero((topics == topic) & is_live)
        order = members[np.argsort(np.linalg.norm(vectors[members] - centre, axis=1), kind="stable")] - first_live
        words = _words(live, set((members - first_live).tolist()))
        clusters.append(Cluster(live_share, reference_share, change, tuple(order[:EXAMPLES].tolist()), words))
    clusters.sort(key=lambda cluster: cluster.change.value, reverse=True)
    return clusters[:MOST_SHOWN]


def _words(live: Sequence[Conversation], members: set[int]) -> tuple[str, ...]:
    """Return words that many conversations of a topic contain and few others do."""
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    users: dict[str, set[str]] = {}
    for number, conversation in enumerate(live):
        words = set(_WORD.findall(conversation.text.lower()))
        (inside if number in members else outside).update(words)
        if number in members:
            for word in words:
                users.setdefault(word, set()).add(conversation.user or str(number))
    others = max(len(live) - len(members), 1)
    ratio = {
        word: (count / len(members)) / ((outside[word] + 1) / others)
        for word, count in inside.items()
        if len(users[word]) >= PRIVATE
    }
    typical = sorted(ratio, key=lambda word: (-ratio[word] * np.log1p(inside[word]), word))
    return tuple(word for word in typical[:WORDS] if ratio[word] > 1.5)


def moment_of_change(vectors: np.ndarray, is_live: np.ndarray, order: np.ndarray) -> int | None:
    """Return the index in `order` after which live rows resemble reference rows less; None if no moment stands out. order: indices
    of the live rows by time."""
    scores = np.empty(len(vectors))
    for part in folds(is_live):
        scores[part] = fold_scores(vectors, is_live, part)
    stream = scores[is_live][order]
    edge = max(10, len(stream) // 50)
    if len(stream) < 4 * edge:
        return None
    places = np.arange(edge, len(stream) - edge)
    sums = np.cumsum(stream)
    mean_before, mean_after = sums[places - 1] / places, (sums[-1] - sums[places - 1]) / (len(stream) - places)
    sizes = (mean_after - mean_before) / (stream.std() * np.sqrt(1 / places + 1 / (len(stream) - places)) + 1e-12)
    best = int(np.argmax(sizes))
    return int(places[best]) if sizes[best] >= SHARP else None
