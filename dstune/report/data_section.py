"""Shows what happened to the rows, from `data_report.json`: counts, cleaning, lengths and sources of each part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dstune.data.inputs import PARTS
from dstune.report.numbers import number, percent
from dstune.report.run_files import RunFiles, section

MAX_EXAMPLES = 5
MAX_LABELS = 12
"""Labels whose rows are counted one by one; of more of them the most and the least frequent ones."""
MAX_LENGTHS = 7
"""Other values of data.max_length that are judged: the powers of two next to the one chosen."""


@dataclass(frozen=True)
class Bar:
    """One class of lengths."""

    label: str
    rows: str
    share: float
    """Height as a share of the highest bar."""
    cut: bool
    """Whether its rows are longer than `data.max_length`."""


@dataclass(frozen=True)
class Histogram:
    bars: list[Bar]
    shortest: str
    longest: str
    cuts: list[tuple[str, str, str, bool]] = field(default_factory=list)
    """(max_length, rows longer, their share, whether it is the run's own)."""


@dataclass(frozen=True)
class Step:
    """One step of cleaning."""

    name: str
    removed: str
    changed: str
    flagged: str
    examples: list[tuple[str, str]]
    """(FILE:LINE, text)"""


@dataclass(frozen=True)
class Part:
    name: str
    facts: list[tuple[str, str, str]]
    """(label, number, remark)"""
    histogram: Histogram | None
    steps: list[Step]
    sources: list[list[str]]
    """Name, and the numbers under `source_columns`."""
    source_columns: list[str]


def parts(run: RunFiles) -> list[Part]:
    """Return every part that the data report of `run` describes."""
    data = section(run.config, "data")
    return [part(name, counts, data) for name in PARTS if (counts := section(run.data, name))]


def part(name: str, counts: Mapping[str, Any], data: Mapping[str, Any]) -> Part:
    """Describe one part. counts: its entry of data_report.json. data: the section `data` of the configuration."""
    max_length = data.get("max_length")
    read, rows, samples = counts.get("rows_read"), counts.get("rows"), counts.get("samples")
    tokens, targets = counts.get("tokens"), counts.get("targets")
    facts: list[tuple[str, str, str]] = []

    def add(label: str, value: Any, remark: str = "") -> None:
        if isinstance(value, (int, float)):
            facts.append((label, number(value), remark))

    add("rows read", read)
    if counts.get("bad_rows"):
        add("bad rows left out", counts["bad_rows"], _share(counts["bad_rows"], read))
    if removed := sum(entry.get("removed") or 0 for entry in _steps(counts).values()):
        add("removed by cleaning", removed, _share(removed, read))
    add("rows of this part", rows)
    augment = section(dict(counts), "augment")
    add("copies among them", augment.get("copies"), _changes(augment))
    for why, count in section(augment, "left_out").items():
        add(f"copies left out, {why.replace('_', ' ')}", count)
    for column, count in section(dict(counts), "unread_columns").items():
        add(f"with a column {column} that is not used", count, _share(count, rows))
    if counts.get("truncated"):
        add("longer than max_length", counts["truncated"], _share(counts["truncated"], rows))
    if counts.get("dropped"):
        add("dropped, no target left", counts["dropped"], _share(counts["dropped"], rows))
    add("samples", samples)
    if (once := counts.get("tokens_once")) and isinstance(samples, int) and samples > counts["conversations"]:
        add(
            "conversations of these",
            counts["conversations"],
            f"{tokens / once:.1f} times the tokens: earlier turns are rewritten",
        )
    add("tokens", tokens)
    if tokens and targets is not None and targets != samples:  # a row of a classifier is one target
        add("targets", targets, f"{percent(targets / tokens)} of the tokens" if targets <= tokens else "")
    facts += _labels(section(dict(counts), "labels"), rows)
    if isinstance(counts.get("packing"), float) and data.get("packing"):
        facts.append(("packing efficiency", percent(counts["packing"]), "positions that hold a token"))
    return Part(
        name=name,
        facts=facts,
        histogram=histogram(counts, max_length),
        steps=[_step(label, entry, _examples(counts, label)) for label, entry in _steps(counts).items()],
        sources=_sources(counts),
        source_columns=_source_columns(counts),
    )


def _labels(counted: Mapping[str, Any], rows: Any) -> list[tuple[str, str, str]]:
    """Return the rows of each label, the most frequent one first."""
    ordered = sorted(counted.items(), key=lambda item: -item[1])
    half = MAX_LABELS // 2
    left_out = ordered[half:-half] if len(ordered) > MAX_LABELS else []
    facts = [(f"label {name}", number(count), _share(count, rows)) for name, count in ordered]
    if left_out:
        between = number(sum(count for _, count in left_out))
        facts[half:-half] = [(f"{len(left_out)} labels between them", between, "")]
    return facts


def _changes(augment: Mapping[str, Any]) -> str:
    """Return `synonyms 20 words, swap 31 words, models 12 rows`"""
    parts = []
    for name, counts_of_change in section(dict(augment), "changed").items():
        parts.append(
            f"{name} {counts_of_change['words']:,} words"
            if counts_of_change.get("words")
            else f"{name} {counts_of_change.get('rows', 0):,} rows"
        )
    return ", ".join(parts)


def histogram(counts: Mapping[str, Any], max_length: Any) -> Histogram | None:
    """Return the histogram of a part's row lengths before truncation; None if they were not counted."""
    from dstune.data import statistics

    try:
        counted = {int(bound): int(rows) for bound, rows in section(dict(counts), "lengths").items()}
    except (TypeError, ValueError):
        return None
    if not counted:
        return None
    classes = statistics.classes(counted)
    highest, total = max(counted.values()), sum(counted.values())
    limit = max_length if isinstance(max_length, int) else None
    bars = []
    below = classes[0][0] - 1 if len(classes) == 1 else 0
    for bound, rows in classes:
        label = f"{below + 1:,} to {bound:,} tokens" if below + 1 < bound else f"{bound:,} tokens"
        bars.append(Bar(label, f"{rows:,}", rows / highest, limit is not None and bound > limit))
        below = bound
    powers = [2**exponent for exponent in range(5, 41) if min(counted) < 2**exponent < 2 * max(counted)]
    near = sorted(powers, key=lambda length: abs(math.log2(length / (limit or max(counted)))))[:MAX_LENGTHS]
    cuts = []
    for length in sorted({*near, *([limit] if limit else [])}):
        longer = statistics.longer_than(counted, length)
        if length == limit and isinstance(counts.get("truncated"), int):
            longer = counts["truncated"]
        cuts.append((f"{length:,}", f"{longer:,}", percent(longer / total), length == limit))
    return Histogram(bars, number(counts.get("shortest")), number(counts.get("longest")), cuts)


def _share(count: Any, total: Any) -> str:
    return f"{percent(count / total)}" if total else ""


def _steps(counts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the steps of cleaning that had an effect."""
    steps = section(dict(counts), "clean")
    return {name: entry for name, entry in steps.items() if isinstance(entry, dict) and any(entry.values())}


def _step(name: str, entry: Mapping[str, Any], examples: list[tuple[str, str]]) -> Step:
    def count_text(key: str) -> str:
        return number(entry[key]) if entry.get(key) else ""

    return Step(name.replace("_", " "), count_text("removed"), count_text("changed"), count_text("flagged"), examples)


def _examples(counts: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    examples = section(dict(counts), "examples").get(name)
    rows = examples if isinstance(examples, list) else []
    example_rows = [row for row in rows if isinstance(row, dict)][:MAX_EXAMPLES]
    return [(str(row.get("place", "")), str(row.get("text", ""))) for row in example_rows]


def _source_columns(counts: Mapping[str, Any]) -> list[str]:
    columns: dict[str, None] = {}
    for entry in section(dict(counts), "sources").values():
        if isinstance(entry, dict):
            columns |= dict.fromkeys(key for key, value in entry.items() if isinstance(value, (int, float)))
    return list(columns)


def _sources(counts: Mapping[str, Any]) -> list[list[str]]:
    columns = _source_columns(counts)
    entries = {name: entry for name, entry in section(dict(counts), "sources").items() if isinstance(entry, dict)}
    return [[str(name), *(number(entry.get(column)) for column in columns)] for name, entry in entries.items()]
