"""Samples of several tasks of one language model, each row encoded as its own task says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from dstune.data.prepared import TEXTS
from dstune.data.tokenize.sample import Encoder, Rows, Sample

TASK = "task"
"""Key of a normalised row: the name of the source in `data.mixture` whose task it is of."""


class SeveralEncoder:
    """encoders: by the name of the source."""

    def __init__(self, encoders: Mapping[str, Encoder]):
        self._encoders = encoders

    @property
    def columns(self) -> Mapping[str, Any]:
        return {name: kind for encoder in self._encoders.values() for name, kind in encoder.columns.items()}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        places = defaultdict(list)
        for place, row in enumerate(rows):
            places[row[TASK]].append(place)
        samples: list[Sample] = []
        for name, own in places.items():
            plain = [{key: value for key, value in rows[place].items() if key != TASK} for place in own]
            samples += self._encoders[name](plain, [numbers[place] for place in own])
        for sample in samples:  # a row without a source and a target has none to generate
            sample.columns |= {name: "" for name in TEXTS if name in self.columns and name not in sample.columns}
        return sorted(samples, key=attrgetter("row"))
