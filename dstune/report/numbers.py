"""Formats the numbers of the report, and chooses the ticks of its axes."""

from __future__ import annotations

import math

THIN_SPACE = "\u2009"
MINUS = "\u2212"
TIMES = "\u00d7"
NONE = "\u2013"
"""Shown instead of a missing number."""


def number(value: float | None, digits: int = 4) -> str:
    """Return `value` with about `digits` significant digits: 3.465, 0.7821, 12,345, 1.5e-5; a dash for None."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", MINUS)
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 1)}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def short(value: float | None) -> str:
    """Return a count in short form: 812, 12.4k, 3.1M, 2.0B."""
    if value is None:
        return NONE
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.1f}{letter}"
    return number(value)


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}{THIN_SPACE}%"


def duration(seconds: float | None) -> str:
    """Return `48 s`, `3 min 6 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from `low` to `high`, with 2 and 5 between them where there are fewer than three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [value for value in ticks if low <= value <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: -(-len(ticks) // 6)] if ticks else [low, high]


def tick_label(value: float, step: float) -> str:
    """Return a tick's number with as many decimals as the distance `step` to its neighbour needs."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5:
        return short(value)
    if step < 1e-3:
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", MINUS)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 2
    return f"{value:,.{decimals}f}".replace("-", MINUS)
