"""The packaged sample of this wing: `sample://attacks`."""

from __future__ import annotations

from dstune.guard.attacks import SOURCES
from dstune.samples import Sample

SAMPLES = (
    Sample(
        "attacks",
        "data",
        "attacks on language models and benign texts of 15 packages, to train and test a guard (task=classification)",
        "see docs/guard-model.md",
        SOURCES[0],
        16_000_000,
        recipe=7,
        parts=SOURCES[1:],
        splits=("validation", "calibration", "test"),
        converter="dstune.guard.attacks.write:convert",
    ),
)
