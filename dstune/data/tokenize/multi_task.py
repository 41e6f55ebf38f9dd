"""Encode rows of several tasks of one language model, each row by its own task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dstune.data.images.places import COLUMN
from dstune.data.prepared import TEXTS
from dstune.data.tokenize.sample import Encoder, Rows, Sample


class MultiTaskEncoder(Encoder):
    """Encodes each row by the task of its source.

    encoders: one for each source, in the order of `data.mixture`. sources: the index of each row's source, int16 [rows].
    """

    def __init__(self, encoders: Sequence[Encoder], sources: np.ndarray):
        self._encoders, self._numbers = encoders, sources
        # Rows of tasks without sources and targets get empty texts in these columns.
        self._absent = {name: "" for name in TEXTS if name in self.columns}

    @property
    def columns(self) -> Mapping[str, Any]:
        return {name: kind for encoder in self._encoders for name, kind in encoder.columns.items()}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        absent = self._absent | ({COLUMN: np.empty(0, np.int32)} if self.images else {})
        places = defaultdict(list)
        for place, number in enumerate(numbers):
            places[int(self._numbers[number])].append(place)
        samples_by_row: dict[int, list[Sample]] = defaultdict(list)
        for source, row_places in places.items():
            for sample in self._encoders[source](
                [rows[place] for place in row_places], [numbers[place] for place in row_places]
            ):
                sample.columns = absent | sample.columns
                samples_by_row[sample.row].append(sample)
        return [sample for number in numbers for sample in samples_by_row[number]]
