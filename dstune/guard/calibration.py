"""Thresholds by rate of false alarms: `guard.json` in an export. A level is a rate of false alarms on held-out benign texts, not a
probability. Thresholds depend on the origin of a text and on its number of windows: the maximum of thirty scores is higher than a
single score."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import read_object

NAME = "guard.json"
FORMAT = 2
"""Version 1 had no parts."""
DIRECTIONS = ("input", "output", "tool_result")
LEVELS: Mapping[str, float] = {
    "l1_confident": 0.001,
    "l2_very_likely": 0.005,
    "l3_likely": 0.01,
    "l4_less_likely": 0.05,
}
"""The rate of false alarms of each level, most certain first."""
UNLIKELY = "l5_unlikely"
ATTACK = "attack"
"""The label of attacks in rows, and in models that dstune trains."""
SMALLEST_PART = 8
"""In tokens. Shorter parts would be hundreds per window, and too short to mean anything."""
CALIBRATE_COMMAND = "dstune guard calibrate"
TRAIN_COMMAND = "dstune train experiment=guard"
"""The command that trains a model, whose thresholds CALIBRATE_COMMAND then sets."""


@dataclass(frozen=True)
class Bucket:
    """Thresholds for texts of about one length."""

    up_to: int | None
    """The most windows of the text and all its variants together; None in the last bucket, for any number."""
    thresholds: Mapping[float, float]
    """By rate of false alarms. A score of at least the threshold is an alarm."""


@dataclass(frozen=True)
class Calibration:
    model_digest: str
    """Digest of the calibrated export (`digest_of`)."""
    directions: Mapping[str, tuple[Bucket, ...]]
    calibrated_on: Mapping[str, Any]
    """The number of benign rows and their digest, by direction."""
    window_tokens: int = 128
    """Length of a window, including special tokens."""
    stride: int = 96
    """Tokens from the start of a window to the start of the next."""
    label: str = ATTACK
    """The model's label whose probability is the score of a window."""
    part_tokens: int = 0
    """Length of the parts in which a suspicious window is scored again; 0 for none."""

    def threshold(self, direction: str, windows: int, level: str) -> float:
        """Return the lowest score that has this level or a more certain one."""
        buckets = self.directions[direction]
        bucket = next(
            (candidate for candidate in buckets if candidate.up_to is None or windows <= candidate.up_to), buckets[-1]
        )
        return bucket.thresholds[LEVELS[level]]

    def level(self, direction: str, windows: int, score: float) -> str:
        """Return the most certain level that `score` reaches."""
        return next((name for name in LEVELS if score >= self.threshold(direction, windows, name)), UNLIKELY)

    def save(self, folder: Path) -> Path:
        """Write `guard.json`. Raises UserError if the values do not form a calibration."""
        value = {
            "format": FORMAT,
            "model_digest": self.model_digest,
            "directions": {
                name: {"by_windows": [_written(bucket) for bucket in buckets]}
                for name, buckets in self.directions.items()
            },
            "calibrated_on": dict(self.calibrated_on),
            "window_tokens": self.window_tokens,
            "stride": self.stride,
            "part_tokens": self.part_tokens,
            "label": self.label,
        }
        _read(value, str(folder / NAME))
        unfinished = folder / f".{NAME}.incomplete"
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / NAME)
        return folder / NAME

    @staticmethod
    def load(folder: Path) -> Calibration | None:
        """Load the calibration; None if the export has none. Raises UserError for a damaged file, or one for other weights."""
        file = folder / NAME
        if not file.is_file():
            return None
        value = read_object(file)
        if value is None:
            raise UserError(Problem(str(file), "is no JSON object", f"{CALIBRATE_COMMAND} EXPORT"))
        calibration = _read(value, str(file))
        if calibration.model_digest != digest_of(folder):
            reason = "was made for other weights or another tokenizer than those beside it"
            raise UserError(Problem(str(file), reason, f"{CALIBRATE_COMMAND} EXPORT"))
        return calibration


def _written(bucket: Bucket) -> dict[str, Any]:
    return {"up_to": bucket.up_to, "thresholds": {f"{rate:g}": value for rate, value in bucket.thresholds.items()}}


def digest_of(folder: Path) -> str:
    """Return the SHA-256 of the files that determine an export's scores: weights, configuration, tokenizer."""
    digest = hashlib.sha256()
    names = ("*.safetensors", "config.json", "tokenizer.json", "vocab.txt", "spiece.model", "spm.model")
    for file in sorted({file for pattern in names for file in folder.glob(pattern) if file.is_file()}):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class _Wrong(Exception):
    """A key, and what is wrong with its value."""


def _read(value: Mapping[str, Any], where: str) -> Calibration:
    try:
        return _calibration(value)
    except _Wrong as error:
        key, reason = error.args
        raise UserError(Problem(f"{where}: {key}", reason, f"{CALIBRATE_COMMAND} EXPORT")) from None


def invalid_window_length(window: Any, stride: Any, part: Any) -> tuple[str, str] | None:
    """Return the key of the first invalid length of the three, with the reason; None if all are valid."""
    if type(window) is not int or not 16 <= window <= 8192:
        return "window_tokens", f"must be a whole number from 16 to 8192, is {window!r}"
    if type(stride) is not int or not 1 <= stride <= window - 2:
        return "stride", f"must be a whole number from 1 to window_tokens - 2, is {stride!r}"
    if type(part) is not int or not (part == 0 or SMALLEST_PART <= part <= window // 2):
        return "part_tokens", f"must be 0 or a whole number from {SMALLEST_PART} to half of window_tokens, is {part!r}"
    return None


def _calibration(value: Mapping[str, Any]) -> Calibration:
    if value.get("format") not in (1, FORMAT):
        raise _Wrong("format", f"must be 1 or {FORMAT}, is {value.get('format')!r}")
    for key in ("model_digest", "label"):
        if not isinstance(value.get(key), str) or not value[key]:
            raise _Wrong(key, "must be a text")
    part = 0 if value["format"] == 1 else value.get("part_tokens")
    lengths: tuple[Any, Any, Any] = (value.get("window_tokens"), value.get("stride"), part)
    if wrong := invalid_window_length(*lengths):
        raise _Wrong(*wrong)
    if not isinstance(value.get("calibrated_on"), dict) or not value["calibrated_on"]:
        raise _Wrong("calibrated_on", "must say which rows the thresholds come from")
    directions_value = value.get("directions")
    if not isinstance(directions_value, dict) or set(directions_value) != set(DIRECTIONS):
        raise _Wrong("directions", f"must be {', '.join(DIRECTIONS)}")
    directions = {name: _buckets(directions_value[name], f"directions.{name}") for name in DIRECTIONS}
    return Calibration(
        value["model_digest"], directions, value["calibrated_on"], *lengths[:2], value["label"], lengths[2]
    )


def _buckets(value: Any, key: str) -> tuple[Bucket, ...]:
    rows = value.get("by_windows") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows:
        raise _Wrong(f"{key}.by_windows", "must be a list with at least one entry")
    buckets = tuple(_bucket(row, f"{key}.by_windows[{number}]") for number, row in enumerate(rows))
    if any(bucket.up_to is None for bucket in buckets[:-1]):
        raise _Wrong(f"{key}.by_windows", "only the last up_to may be null")
    if any(later.up_to is not None and later.up_to <= (bucket.up_to or 0) for bucket, later in pairwise(buckets)):
        raise _Wrong(f"{key}.by_windows", "up_to must rise")
    return buckets


def _bucket(row: Any, key: str) -> Bucket:
    if not isinstance(row, dict) or not isinstance(row.get("thresholds"), dict):
        raise _Wrong(key, "must have up_to and thresholds")
    up_to = row.get("up_to")
    if up_to is not None and (type(up_to) is not int or up_to < 1):
        raise _Wrong(f"{key}.up_to", f"must be a whole number of at least 1, or null, is {up_to!r}")
    rates = {f"{rate:g}": rate for rate in LEVELS.values()}
    if set(row["thresholds"]) != set(rates):
        raise _Wrong(f"{key}.thresholds", f"must have the rates {', '.join(rates)}")
    threshold_by_rate: dict[float, float] = {}
    for text, rate in rates.items():
        number = row["thresholds"][text]
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise _Wrong(f"{key}.thresholds.{text}", f"must be a number, is {number!r}")
        threshold_by_rate[rate] = float(number)
    if any(earlier < later for earlier, later in pairwise(threshold_by_rate.values())):
        raise _Wrong(f"{key}.thresholds", "a lower rate of false alarms must have a threshold that is not lower")
    return Bucket(up_to, threshold_by_rate)
