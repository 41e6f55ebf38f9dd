"""Checks a conversation by a policy: which detectors look at which texts, and what follows from their findings."""

from __future__ import annotations

import asyncio
import itertools
import re
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from dstune.guard.calibration import LEVELS, UNLIKELY
from dstune.guard.policy import BLOCK, CLOSED, EXACT, FLAG, MASK, SPANS, Policy, Watch, needs_model
from dstune.guard.scanner import Item, Result

CONFIDENT = next(iter(LEVELS))
NOT_RUN = "not_run"
MOST_TEXTS = 8192
"""Per request: each text costs the gateway and the guard some work, however short it is."""
Scan = Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]
"""Scans texts; raises GuardDown if the guard cannot."""


class GuardDown(Exception):
    """The texts could not be scanned."""


class GuardTimeout(GuardDown):
    """The scan did not finish within the policy's time limit; it may still be running."""


@dataclass(frozen=True)
class Text:
    """A text of a conversation."""

    text: str
    role: str
    message: int = 0
    """Index of its message in the conversation."""

    @property
    def direction(self) -> str:
        """Empty for system messages, which are trusted."""
        return DIRECTION_OF.get(self.role, "input")


DIRECTION_OF = {
    "system": "",
    "developer": "",
    "assistant": "output",
    "tool": "tool_result",
    "function": "tool_result",
    "user": "input",
}


@dataclass(frozen=True)
class Span:
    """A part of a text that is reported or masked."""

    text: int
    """Index of the text among the checked texts."""
    start: int
    end: int
    detector: str
    masked: bool = False
    """Whether the policy masks it here: a detector may have another action in another direction."""


@dataclass(frozen=True)
class Entry:
    """The result of one detector on one message."""

    detector: str
    message: int
    action: str
    detected: bool | None
    """None if it did not run."""
    level: str
    """The level of the finding, `l5_unlikely` if there is none, `not_run`, or `uncalibrated`."""
    label: str = ""


@dataclass
class Verdict:
    policy: Policy
    entries: list[Entry] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    """Every detection with a place, whatever its action."""
    not_run: dict[str, str] = field(default_factory=dict)
    """Why a detector did not run somewhere, by detector."""
    windows: int = 0
    tokens: int = 0
    """Tokens to charge, for windows and their parts."""
    variants: int = 0

    @property
    def detected(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.detected]

    @property
    def blocked(self) -> list[str]:
        """Detectors that block the request, without repetitions."""
        return sorted({entry.detector for entry in self.detected if entry.action == BLOCK})

    @property
    def flagged(self) -> bool:
        """Whether any finding has an action beyond reporting."""
        return any(entry.action != FLAG for entry in self.detected)

    @property
    def unchecked(self) -> list[str]:
        """Detectors that should have acted and did not run."""
        acting = {entry.detector for entry in self.entries if entry.detected is None and entry.action != FLAG}
        return sorted(acting)

    @property
    def refused(self) -> bool:
        """Whether the conversation must not be treated as checked."""
        return bool(self.unchecked) and self.policy.on_failure == CLOSED

    def masks(self) -> dict[int, list[Span]]:
        """Return the masked spans by the number of their text, in order and disjoint. For all texts at once, since a call per
        text would scan all spans each time."""
        spans_by_text: dict[int, list[Span]] = {}
        for span in sorted(
            (span for span in self.spans if span.masked), key=lambda span: (span.text, span.start, -span.end)
        ):
            text_spans = spans_by_text.setdefault(span.text, [])
            if not text_spans or span.start >= text_spans[-1].end:
                text_spans.append(span)
            elif span.end > text_spans[-1].end:  # an overlapping one that ends later: masked together
                text_spans[-1] = replace(text_spans[-1], end=span.end)
        return spans_by_text


def masked(text: str, masks: Sequence[Span]) -> str:
    """Return `text` with its masks replaced by tags; they are in order and disjoint."""
    parts, end = [], 0
    for span, replacement in zip(masks, tags(text, masks), strict=True):
        parts += [text[end : max(span.start, 0)], replacement]
        end = span.end
    return "".join([*parts, text[end:]])


CHARACTERS = 384
"""Characters from the start of a window to that of the next: 96 tokens of four."""


def estimated_windows(policy: Policy, texts: Iterable[Text]) -> int:
    """Estimate how many windows of the texts models had to score, for when no answer states it."""
    read = {
        direction
        for direction, watches in policy.directions.items()
        if any(needs_model(entry.detector) for entry in watches)
    }
    return sum(1 + len(entry.text) // CHARACTERS for entry in texts if entry.direction in read and entry.text.strip())


_JSON = re.compile(r'\s*(?:\{|\[\s*["{\[\d-])')
_QUOTE = re.compile(r'\\.|"', re.S)


def tags(text: str, masks: Sequence[Span]) -> list[str]:
    """Return the replacement of each masked span, such as `<EMAIL>`. In JSON, a value that is not in a string, such as a number,
    becomes a string."""
    tags_of_masks = [f"<{mask.detector.rpartition('/')[2].upper()}>" for mask in masks]
    if not masks or not _JSON.match(text):
        return tags_of_masks
    quotes = [match.start() for match in _QUOTE.finditer(text) if match.group() == '"']
    within = [bisect_left(quotes, mask.start) % 2 for mask in masks]
    return [
        replacement if inside else f'"{replacement}"' for replacement, inside in zip(tags_of_masks, within, strict=True)
    ]


@dataclass
class Checker:
    scan: Scan

    async def __call__(self, policy: Policy, texts: Sequence[Text], *, everything: bool = False) -> Verdict:
        """Check the texts of a request. everything: run all detectors, even after one has found enough to block. Raises GuardDown,
        GuardTimeout."""
        verdict = Verdict(policy)
        if len(texts) > MOST_TEXTS:
            for direction, watches in policy.directions.items():
                piece = _Piece(item_of(policy, "", direction), watches, 0, None)
                self._unchecked(verdict, piece, f"more than {MOST_TEXTS} texts")
            return verdict
        pieces = list(_pieces(policy, texts))
        if reason := _excess(policy, [piece for piece in pieces if piece.number is not None]):
            for piece in pieces:
                self._unchecked(verdict, piece, reason)
            return verdict
        items = [replace(piece.item, decisive=frozenset()) if everything else piece.item for piece in pieces]
        for piece, result in zip(pieces, await self.scan_in_time(policy, items), strict=True):
            self._add(verdict, piece, result)
        return verdict

    async def piece(self, policy: Policy, item: Item) -> Verdict:
        """Check one piece of a streamed answer."""
        verdict = Verdict(policy)
        if item.detectors:
            (result,) = await self.scan_in_time(policy, [item])
            self._add(verdict, _Piece(item, policy.watches(item.direction), 0, 0), result)
        return verdict

    async def scan_in_time(self, policy: Policy, items: Sequence[Item]) -> Sequence[Result]:
        if not items:
            return []
        try:
            async with asyncio.timeout(policy.limits.seconds):
                return await self.scan(items)
        except TimeoutError:
            raise GuardTimeout(f"took more than {policy.limits.seconds:g} s") from None

    @staticmethod
    def _unchecked(verdict: Verdict, piece: _Piece, reason: str) -> None:
        for watch in piece.watches:
            verdict.not_run[watch.detector] = reason
            verdict.entries.append(Entry(watch.detector, piece.message, watch.action, None, NOT_RUN))

    @staticmethod
    def _add(verdict: Verdict, piece: _Piece, result: Result) -> None:
        verdict.windows += result.computed
        verdict.tokens += result.tokens
        verdict.variants += result.variants
        verdict.not_run |= dict(result.not_run)
        for watch in piece.watches:
            verdict.entries.append(entry_of(watch, result, piece.message))
        if piece.number is not None:
            masked = {watch.detector for watch in piece.watches if watch.action == MASK}
            place = piece.start
            verdict.spans += [
                Span(
                    piece.number,
                    finding.start + place,
                    finding.end + place,
                    finding.detector,
                    finding.detector in masked,
                )
                for finding in result.found
                if finding.detector in SPANS
            ]


def entry_of(watch: Watch, result: Result, message: int = 0) -> Entry:
    """Return a detector's result on a text."""
    if not needs_model(watch.detector):
        finding = next((candidate for candidate in result.found if candidate.detector == watch.detector), None)
        level = CONFIDENT if finding else UNLIKELY
        return Entry(
            watch.detector, message, watch.action, finding is not None, level, finding.label if finding else ""
        )
    scored = result.scores.get(watch.detector)
    if scored is None:
        return Entry(watch.detector, message, watch.action, None, NOT_RUN)
    if scored.level is None:  # without calibration a score has no level; 0.5 is the boundary of its training
        return Entry(watch.detector, message, watch.action, scored.score >= 0.5, "uncalibrated", scored.variant)
    order = [*LEVELS, UNLIKELY]
    detected = order.index(scored.level) <= order.index(watch.level)
    return Entry(watch.detector, message, watch.action, detected, scored.level, scored.variant if detected else "")


# -- texts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    item: Item
    watches: tuple[Watch, ...]
    message: int
    number: int | None
    """Index of its text; None for several texts joined, in which places have no meaning."""
    start: int = 0
    """Its offset in the text."""


def item_of(policy: Policy, text: str, direction: str, prompts: Iterable[str] = (), public: Iterable[str] = ()) -> Item:
    watches = policy.watches(direction)
    return Item(
        text,
        direction,
        frozenset(watch.detector for watch in watches),
        links=policy.links,
        prompts=tuple(prompts),
        public=tuple(public),
        canaries=policy.canaries,
        codes=policy.codes,
        decisive=frozenset(watch.detector for watch in watches if watch.action == BLOCK and watch.detector in EXACT),
        most_windows=policy.limits.windows,
    )


def _pieces(policy: Policy, texts: Sequence[Text]) -> Iterable[_Piece]:
    prompts = tuple(placed_text.text for placed_text in texts if not placed_text.direction and placed_text.text.strip())
    public = tuple(placed_text.text for placed_text in texts if placed_text.direction in ("input", "tool_result"))
    for number, placed_text in enumerate(texts):
        for start, text, direction in _parts(policy, placed_text):
            if text.strip() and (watches := policy.watches(direction)):
                yield _Piece(
                    item_of(policy, text, direction, prompts, public), watches, placed_text.message, number, start
                )
    # Neighbouring texts are also checked as one, since an attack may be split into several messages, or by documents.
    for direction, group in itertools.groupby(texts, lambda placed_text: placed_text.direction):
        run = [placed_text for placed_text in group if placed_text.text.strip()]
        watches = tuple(watch for watch in policy.watches(direction) if watch.detector not in SPANS)
        if run and direction and watches:
            for text, watches_of_text in _joined(policy, run, watches):
                item = _only(item_of(policy, text, direction, prompts, public), watches_of_text)
                yield _Piece(item, watches_of_text, run[-1].message, None)


def _excess(policy: Policy, pieces: Sequence[_Piece]) -> str:
    """Return why there is too much to check; empty if there is not. pieces: of single texts."""
    if len(pieces) > MOST_TEXTS:  # even few texts may be split into many by markers
        return f"more than {MOST_TEXTS} texts"
    if sum(len(piece.item.text) for piece in pieces) > policy.limits.characters:
        return f"more than {policy.limits.characters} characters"
    return ""


def _only(item: Item, watches: Iterable[Watch]) -> Item:
    """Return the item with the detectors of `watches` only."""
    detectors = frozenset(watch.detector for watch in watches)
    return replace(item, detectors=detectors, decisive=item.decisive & detectors)


def _parts(policy: Policy, text: Text) -> Iterable[tuple[int, str, str]]:
    """Yield the offset of each part of a text, the part, and its direction. Documents between markers count as tool results if the
    policy checks those; otherwise they count like the rest of the text, or a typed marker would evade the check."""
    if not text.direction:
        return
    place = 0
    for document in _documents(policy, text) if policy.watches("tool_result") else ():
        yield place, text.text[place : document.start], text.direction
        yield document.start, text.text[document.start : document.end], "tool_result"
        place = document.end
    yield place, text.text[place:], text.direction


def _joined(policy: Policy, run: Sequence[Text], watches: tuple[Watch, ...]) -> Iterable[tuple[str, tuple[Watch, ...]]]:
    """Yield neighbouring texts of one direction joined, with the detectors for them: the authors' own words, and those with the
    documents between them."""
    documents = [list(_documents(policy, placed_text)) for placed_text in run]
    own_words = [
        _without(placed_text.text, [(each.opens, each.closes) for each in documents_of_text])
        for placed_text, documents_of_text in zip(run, documents, strict=True)
    ]
    if sum(bool(part.strip()) for parts in own_words for part in parts) > 1:
        for text in _readings(own_words):
            yield text, watches
    # Half of an attack may be in a document. A model would take all documents for the user's words, and a detector that
    # does not check documents otherwise must not do so here.
    among = {watch.detector for watch in policy.watches("tool_result") or watches}
    exact = tuple(watch for watch in watches if watch.detector in EXACT and watch.detector in among)
    if exact and any(documents):
        whole = [
            _without(placed_text.text, [place for each in documents_of_text for place in each.markers])
            for placed_text, documents_of_text in zip(run, documents, strict=True)
        ]
        for text in _readings(whole):
            yield text, exact


def _without(text: str, places: Iterable[tuple[int, int]]) -> list[str]:
    """Return the parts of a text between these places, which are in order and disjoint."""
    parts, place = [], 0
    for start, end in places:
        parts.append(text[place:start])
        place = end
    return [part for part in (*parts, text[place:]) if part]


def _readings(texts: Sequence[Sequence[str]]) -> list[str]:
    """Return the parts of several texts joined: end to end, and also with a space in between if that would join two words."""
    readings = [" ".join("".join(parts) for parts in texts)]
    if any(not (first[-1].isspace() or second[0].isspace()) for parts in texts for first, second in pairwise(parts)):
        readings.append(" ".join(" ".join(parts) for parts in texts))
    return readings


@dataclass(frozen=True)
class _Document:
    """A part of a text between markers."""

    opens: int
    """Start of its first marker."""
    start: int
    end: int
    closes: int
    """End of its second marker."""

    @property
    def markers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.opens, self.start), (self.end, self.closes)


def _documents(policy: Policy, text: Text) -> Iterable[_Document]:
    """Yield the documents in a user's text. Without an end marker a document extends to the end of the text."""
    if text.direction != "input" or not policy.document_markers:
        return
    ends = dict(reversed(policy.document_markers))
    opening = re.compile("|".join(map(re.escape, sorted(ends))))
    place = 0
    while (opening_match := opening.search(text.text, place)) is not None:
        end = text.text.find(ends[opening_match.group()], opening_match.end())
        end, place = (end, end + len(ends[opening_match.group()])) if end >= 0 else (len(text.text), len(text.text))
        yield _Document(opening_match.start(), opening_match.end(), end, place)
