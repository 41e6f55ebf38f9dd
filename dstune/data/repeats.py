"""Choose the samples that each epoch takes from each source of a mixture: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class Repeats:
    """The samples that each epoch takes from each source.

    sources: the source of each sample, [samples], numbered from 0. weights: by source, how often an epoch repeats its
    samples, above 0.

    Each source is an endless stream of passes, each a permutation of its n samples; epoch e takes the positions from
    floor(e w n) to floor((e + 1) w n). So after any number of epochs, the counts of two samples of one source differ by
    one at most, and rounding loses no weight.

    Example, n = 4 and w = 0.5: epochs 0 and 1 take two samples each, together all four; epoch 2 starts another pass.
    """

    def __init__(self, sources: np.ndarray, weights: Sequence[float], seed: int):
        self._members = [np.flatnonzero(sources == number) for number in range(len(weights))]
        # Use the decimal that the user wrote: 0.29 of 100 samples are 29, but with the nearest float 28.
        self._weights = [Fraction(str(weight)) for weight in weights]
        self._seed = seed

    @property
    def constant(self) -> bool:
        """Whether every epoch has the same samples."""
        return all(weight.denominator == 1 for weight in self._weights)

    def samples(self, epoch: int) -> np.ndarray:
        """Return the samples of `epoch`, repeated as often as it uses them, in arbitrary order: int64."""
        parts: list[np.ndarray] = []
        for source, (members, weight) in enumerate(zip(self._members, self._weights, strict=True)):
            count = len(members)
            position, end = (int(bound * weight * count) for bound in (epoch, epoch + 1))
            while position < end:
                number, start = divmod(position, count)
                stop = min(count, start + end - position)
                parts.append(members if stop - start == count else self._order(source, number)[start:stop])
                position += stop - start
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _order(self, source: int, number: int) -> np.ndarray:
        """Return the samples of a source in the order of its pass `number`."""
        generator = np.random.MT19937(np.random.SeedSequence([self._seed, source, number]))
        return self._members[source][np.random.RandomState(generator).permutation(len(self._members[source]))]
