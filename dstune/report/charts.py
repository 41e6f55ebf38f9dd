"""Line charts as numbers for the template: an SVG that stretches to any width, with axis labels beside it in HTML.

Charts are drawn here and not in the browser, so that the page shows its curves without scripts, on paper and in tests. (A library
that draws on a canvas, such as uPlot with 50 kB, would need its script for all of that, and redraw for each theme.) The script of
the page only adds the values under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dstune.report.numbers import log_ticks, number, tick_label, ticks
from dstune.report.series import Series, thinned

SIZE = 1000
"""The drawing is SIZE by SIZE units, stretched to the plot's real width and height."""
DOTS_UP_TO = 24
"""Curves with at most this many points show each point."""
LOG_RATIO = 200.0
"""Positive values that span more than this are drawn on a logarithmic axis: one spike would flatten all others."""
COLOURS = 8


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    series: Series
    colour: int
    """Number of the palette's colour; dashes tell the runs beyond the last colour."""
    faint: bool = False
    """Drawn in the background: unsmoothed values behind their smoothed curve."""


@dataclass(frozen=True)
class Mark:
    """A vertical line: a checkpoint, a resume, or the best evaluation."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart as the template draws it. Positions are per cent of the plot, from the left and from the top."""

    title: str
    note: str
    latest: str
    lines: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[dict[str, Any]]
    hover: dict[str, Any]
    """Steps, and each curve's values and heights, for the script."""
    summary: str
    """The content of the chart as text, for readers who cannot see it."""
    metric: str = ""


@dataclass
class _Axis:
    low: float
    high: float
    logarithmic: bool = False
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def at(self, value: float) -> float:
        """Return the share of the axis below `value`, from 0 to 1."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return (value - low) / (high - low)


def draw(
    title: str,
    lines: Sequence[Line],
    span: tuple[int, int],
    *,
    metric: str = "",
    note: str = "",
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    tall: bool = False,
) -> Chart:
    """Return the chart of `lines`. span: first and last step of the page, so that its charts stand above each other.

    from_zero: whether the axis starts at 0, for quantities whose absolute size matters (memory, tokens per second). tall: whether
    there is room for more ticks.
    """
    across = _Axis(span[0], max(span[1], span[0] + 1))
    up = _vertical([value for line in lines for value in line.series.finite], from_zero, 7 if tall else 4)
    drawn = [_drawn(line, across, up) for line in lines]
    steps = _whole_ticks(across)
    clear_lines = [line for line in lines if not line.faint]
    gaps = sum(line.series.gaps for line in clear_lines)
    notes = [note, "logarithmic" if up.logarithmic else "", f"{gaps} not finite" if gaps else ""]
    return Chart(
        title=title,
        metric=metric,
        note=", ".join(text for text in notes if text),
        latest=number(clear_lines[0].series.last) if len(clear_lines) == 1 else "",
        lines=drawn,
        x_ticks=[(100 * across.at(step), f"{step:,}") for step in steps],
        y_ticks=[(100 * (1 - up.at(value)), label) for value, label in up.ticks],
        marks=[
            {"at": round(100 * across.at(mark.step), 2), "kind": mark.kind, "text": mark.text}
            for mark in marks
            if span[0] <= mark.step <= across.high
        ],
        hover={"span": [across.low, across.high], "lines": [_hover(line, up) for line in lines]},
        summary=f"{title}: " + "; ".join(_sentence(line) for line in clear_lines),
    )


def _vertical(values: Sequence[float], from_zero: bool, count: int) -> _Axis:
    low, high = min(values), max(values)
    if not from_zero and low > 0 and high / low > LOG_RATIO:
        axis = _Axis(low / 1.1, high * 1.1, logarithmic=True)
        axis.ticks = [(value, number(value, 3)) for value in log_ticks(axis.low, axis.high)]
        return axis
    if from_zero:
        low = min(low, 0.0)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-30):  # a constant
        room = abs(high) * 0.1 or 1.0
        low, high = (low, high + room) if from_zero else (low - room, high + room)
    room = 0.06 * (high - low)
    axis = _Axis(low if low == 0 else low - room, high + room)
    tick_values = ticks(axis.low, axis.high, count)
    step = tick_values[1] - tick_values[0] if len(tick_values) > 1 else abs(tick_values[0])
    axis.ticks = [(value, tick_label(value, step)) for value in tick_values]
    return axis


def _whole_ticks(axis: _Axis) -> list[int]:
    steps = sorted({round(step) for step in ticks(axis.low, axis.high, 5)})
    return [step for step in steps if axis.low <= step <= axis.high]


def _drawn(line: Line, across: _Axis, up: _Axis) -> dict[str, Any]:
    series = thinned(line.series)
    parts: list[str] = []
    points: list[tuple[float, float]] = []
    command = "M"
    for step, value in zip(series.steps, series.values, strict=True):
        if value is None:
            command = "M"
            continue
        x, y = SIZE * across.at(step), SIZE * (1 - up.at(value))
        parts.append(f"{command}{x:.1f} {y:.1f}")
        points.append((round(x * 100 / SIZE, 2), round(y * 100 / SIZE, 2)))
        command = "L"
    return {
        "label": line.label,
        "path": "".join(parts),
        "colour": line.colour % COLOURS,
        "dashed": line.colour >= COLOURS,
        "faint": line.faint,
        # A line of one point has no length, nor has a point between two gaps.
        "dots": points if not line.faint and len(points) <= DOTS_UP_TO else [],
    }


def _hover(line: Line, up: _Axis) -> dict[str, Any]:
    """Return what the page shows of a line under the pointer. up: the vertical axis."""
    series = thinned(line.series)
    return {
        "label": line.label,
        "colour": line.colour % COLOURS,
        "faint": line.faint,
        "steps": series.steps,
        "text": [number(value) if value is not None else "not finite" for value in series.values],
        "top": [None if value is None else round(100 * (1 - up.at(value)), 2) for value in series.values],
    }


def _sentence(line: Line) -> str:
    finite = line.series.finite
    if len(finite) == 1:
        return f"{line.label} {number(finite[0])} at step {line.series.steps[0]:,}"
    first, last = number(finite[0]), number(finite[-1])
    between = f"between {number(min(finite))} and {number(max(finite))}"
    return f"{line.label} from {first} to {last}, {between}, over {len(finite):,} values"
