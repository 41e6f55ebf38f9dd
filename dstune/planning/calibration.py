"""Results of `dstune plan --calibrate` on this machine, cached by the number of ranks."""

from __future__ import annotations

import json
from typing import Any

from dstune.core import files
from dstune.core.paths import cache_root
from dstune.planning.time import Speed

FILE = "calibration-2.json"
"""File name in the cache; it changes when the meaning of the measurements does."""


def remember(measured: dict[str, Any]) -> None:
    """Store a measurement of `dstune.rank.calibrate`, replacing an earlier one with as many ranks."""
    everything = _read()
    everything[str(measured["ranks"])] = measured
    cache_root().mkdir(parents=True, exist_ok=True)
    files.write(cache_root() / FILE, json.dumps(everything, indent=1))


def speeds(ranks: int, *, on_gpu: bool, device: str | None = None, threads: int | None = None) -> dict[int, Speed]:
    """Return the measured speeds for this number of ranks, by the bytes of a weight; empty if there are none. device, threads: the
    GPU's name and the threads of a CPU rank; a measurement with others does not count."""
    measured = _read().get(str(ranks), {})
    try:
        if (measured["device"] == "CPU") == on_gpu:
            return {}
        other = device not in (None, measured["device"]) if on_gpu else threads not in (None, measured["threads"])
        return {} if other else {int(size): Speed(**numbers) for size, numbers in measured["speeds"].items()}
    except (KeyError, TypeError, ValueError):  # nothing was measured, or by another version
        return {}


def _read() -> dict[str, Any]:
    try:
        value = json.loads((cache_root() / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
