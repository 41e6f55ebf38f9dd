"""Renders rows and figures as lines of text, with colours on a terminal and brackets elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from dstune.data.statistics import longer_than
from dstune.report.data_section import Part, part
from dstune.report.numbers import percent
from dstune.show.facts import Preview, Repeated, Row
from dstune.show.segments import Segment

BAR_CELLS = 40
MAX_CHARACTERS = 1200
"""Longer pieces are shown without their middle; the page (--html) and --json have all of it."""

RESET = "\x1b[0m"
TRAINED, SPECIAL, QUIET, STRONG = "\x1b[32m", "\x1b[35m", "\x1b[2m", "\x1b[1m"
TAGS = (
    "\x1b[32m",
    "\x1b[36m",
    "\x1b[33m",
    "\x1b[34m",
    "\x1b[31m",
    "\x1b[92m",
    "\x1b[96m",
    "\x1b[93m",
    "\x1b[94m",
    "\x1b[91m",
)
"""Colours for the kinds of entities, which are sorted by name."""


@dataclass(frozen=True)
class Style:
    """How the text is marked up."""

    colours: bool
    blocks: bool
    """Whether the output's encoding has block characters."""

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str]) -> Style:
        """Choose the style: colours on a terminal unless NO_COLOR is set (no-color.org) or TERM is dumb."""
        plain = bool(environ.get("NO_COLOR")) or environ.get("TERM") == "dumb"
        return cls(stream.isatty() and not plain, "utf" in (stream.encoding or "").lower())

    def paint(self, text: str, *codes: str) -> str:
        return f"{''.join(codes)}{text}{RESET}" if self.colours and text and codes else text

    def cell(self) -> str:
        return "\u2588" if self.blocks else "#"


def text(preview: Preview, style: Style) -> str:
    """Return the complete output as one text."""
    key = style.paint("trained", TRAINED) if style.colours else "[[trained]]"
    lines = [
        style.paint(f"{preview.split}: {preview.samples:,} samples", STRONG) + f", task={preview.task}, {preview.model}"
    ]
    if preview.note:
        lines.append(preview.note)
    tags = sorted({segment.tag for row in preview.rows for segment in row.segments if segment.tag})
    if tags:
        painted = [style.paint(visible(tag), _tag_colour(tag, tags)) for tag in tags]
        lines.append(f"tags: {', '.join(painted)}")
    elif any(segment.trained for row in preview.rows for segment in row.segments):
        lines.append(f"tokens that count in the loss are {key}")
    for row in preview.rows:
        lines += ["", _heading(row, preview, style), *_turns(row, style, tags)]
        for number, image in enumerate(row.images, start=1):
            size = f"{image.width:,} x {image.height:,} pixels"
            lines.append(style.paint(f"image {number}: {visible(image.name)}, {size}", QUIET))
        for text in row.beside:
            lines += [style.paint(f"{text.name}:", QUIET), _text(text.segments, style, tags)]
        if row.rejected:
            trained = f", {row.rejected_targets:,} trained" if row.rejected_targets else ""
            lines += [style.paint(f"rejected{trained}:", QUIET), _text(row.rejected, style, tags)]
    if preview.report:
        described = part(preview.split, preview.report, preview.data)
        lines += ["", style.paint("rows", STRONG), *_facts(described)]
        lines += _lengths(preview, style)
        lines += _cleaning(described, style) + _sources(described, style)
        lines += _repeated("samples that occur more than once", preview.duplicates, style)
        lines += _repeated("trained texts that occur in several samples", preview.answers, style)
    return "\n".join(lines)


def _heading(row: Row, preview: Preview, style: Style) -> str:
    full = " (max_length)" if row.tokens == preview.data["max_length"] else ""
    facts = [f"sample {row.number:,} of {preview.samples:,}", f"{row.tokens:,} tokens{full}"]
    if row.targets is not None and (row.label is None or any(segment.trained for segment in row.segments)):
        facts.append(f"{row.targets:,} trained")
    if row.label is not None:
        facts.append(f"label {visible(row.label)}")
    if row.source is not None:
        facts.append(f"from {visible(row.source)}")
    return style.paint(f"--- {', '.join(facts)} ---", QUIET)


def _turns(row: Row, style: Style, tags: list[str]) -> list[str]:
    """Return the lines of a sample; of a conversation with several targets, each turn's context and then its target."""
    if len(row.turns) < 2:
        return [_text(row.segments, style, tags)]
    lines = []
    for number, turn in enumerate(row.turns, start=1):
        for name, pieces in (("context", turn.context), ("target", turn.target)):
            count = sum(piece.tokens for piece in pieces)
            lines += [style.paint(f"turn {number}, {name} of {count:,} tokens:", QUIET), _text(pieces, style, tags)]
    if row.rest:
        lines += [style.paint("behind it:", QUIET), _text(row.rest, style, tags)]
    return lines


def _tag_colour(tag: str, tags: list[str]) -> str:
    return TAGS[tags.index(tag) % len(TAGS)]


def _text(segments: list[Segment], style: Style, tags: list[str]) -> str:
    pieces = []
    inside = False
    for segment in segments:
        piece = _shortened(visible(segment.text))
        if segment.tag:
            text, space = piece.lstrip(), piece[: len(piece) - len(piece.lstrip())]
            tagged_text = f"{text} {segment.tag}" if style.colours else f"[[{text}]]({segment.tag})"
            pieces.append(space + style.paint(tagged_text, _tag_colour(segment.tag, tags)))
            continue
        if style.colours:
            codes = [TRAINED] if segment.trained else []
            if segment.special:
                codes = [*codes, STRONG] if segment.trained else [SPECIAL]
            pieces.append("\n".join(style.paint(line, *codes) for line in piece.split("\n")))
            continue
        if segment.trained != inside:
            pieces.append("[[" if segment.trained else "]]")
            inside = segment.trained
        pieces.append(piece)
    return ("".join(pieces) + ("]]" if inside else "")).rstrip("\n")


def visible(value: str) -> str:
    """Return `value` with control characters escaped (`\\x1b`), so that a terminal does not obey them. Line feeds and tabs stay."""
    return "".join(
        character if character in "\n\t" or character.isprintable() else character.encode("unicode_escape").decode()
        for character in value
    )


def _shortened(value: str) -> str:
    if len(value) <= MAX_CHARACTERS:
        return value
    half = MAX_CHARACTERS // 2
    return f"{value[:half]} [... {len(value) - 2 * half:,} characters ...] {value[-half:]}"


def _facts(described: Part) -> list[str]:
    width = max(len(label) for label, _, _ in described.facts)
    numbers = max(len(number) for _, number, _ in described.facts)
    return [
        f"  {label:<{width}}  {number:>{numbers}}  {remark}".rstrip().replace("\u2009", " ")
        for label, number, remark in described.facts
    ]


def _lengths(preview: Preview, style: Style) -> list[str]:
    """Return a bar for each power of two, and how many rows that value of max_length would cut."""
    counted = {int(bound): int(rows) for bound, rows in (preview.report.get("lengths") or {}).items()}
    if not counted:
        return []
    edges = [2**exponent for exponent in range(41)]
    octaves = [(edge // 2 + 1, edge, longer_than(counted, edge // 2) - longer_than(counted, edge)) for edge in edges]
    first = next(index for index, (_, _, rows) in enumerate(octaves) if rows)
    octaves = [octave for octave in octaves[first:] if octave[0] <= max(counted)]
    highest, total = max(rows for _, _, rows in octaves), sum(counted.values())
    limit = preview.data["max_length"]
    width = len(f"{octaves[-1][1]:,}")
    lines = ["", style.paint("lengths in tokens", STRONG) + f" (data.max_length={limit})"]
    for low, high, rows in octaves:
        bar = style.cell() * max(round(BAR_CELLS * rows / highest), int(rows > 0))
        longer = longer_than(counted, high)
        cut = f"  max_length={high} cuts {longer:,} ({percent(longer / total)})" if longer else ""
        count = f"{bar:<{BAR_CELLS}} {rows:>9,}"
        lines.append(f"  {low:>{width},} to {high:>{width},}  {count}{cut}".replace("\u2009", " ").rstrip())
    return lines


def _cleaning(described: Part, style: Style) -> list[str]:
    if not described.steps:
        return []
    lines = ["", style.paint("cleaning", STRONG)]
    for step in described.steps:
        counts = (("removed", step.removed), ("changed", step.changed), ("flagged", step.flagged))
        lines.append(f"  {step.name}: {', '.join(f'{count} {name}' for name, count in counts if count)}")
        lines += [f"    {visible(place)}  {visible(' '.join(example.split()))}" for place, example in step.examples]
    return lines


def _sources(described: Part, style: Style) -> list[str]:
    if not described.sources:
        return []
    cells = [["source", *(name.replace("_", " ") for name in described.source_columns)], *described.sources]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["", style.paint("sources", STRONG)]
    for name, *numbers in cells:
        columns_text = "  ".join(f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        lines.append(f"  {visible(name):<{widths[0]}}  {columns_text}")
    return lines


def _repeated(title: str, repetitions: list[Repeated], style: Style) -> list[str]:
    if not repetitions:
        return []
    width = len(f"{repetitions[0].count:,}")
    rows = [f"  {repeated.count:>{width},} x  {visible(repeated.text)}" for repeated in repetitions]
    return ["", style.paint(title, STRONG), *rows]
