"""A conversation under a policy: which of its texts are looked at as what, and what follows from what was found."""

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
"""Of one request: each costs the gateway and the guard some work, however short it is."""
Scan = Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]
"""Looks at texts; raises GuardDown where nothing can."""


class GuardDown(Exception):
    """Nothing looked at the texts."""


class Late(GuardDown):
    """Nothing has looked at the texts by the time that the policy allows; it may still be at it."""


@dataclass(frozen=True)
class Text:
    """A part of a conversation."""

    text: str
    role: str
    message: int = 0
    """Its number in the conversation."""

    @property
    def direction(self) -> str:
        """Empty for the system's own words, which are trusted."""
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
    """A part of a text that is named or masked."""

    text: int
    """Number of the text among those that were checked."""
    start: int
    end: int
    detector: str
    masked: bool = False
    """Whether the policy masks it where it stands: a detector may have another action in another direction."""


@dataclass(frozen=True)
class Entry:
    """One detector of the policy on one message."""

    detector: str
    message: int
    action: str
    detected: bool | None
    """None where it did not run."""
    level: str
    """Of the find, `l5_unlikely` where there is none, `not_run`, or `uncalibrated`."""
    label: str = ""


@dataclass
class Verdict:
    policy: Policy
    entries: list[Entry] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    """All that has a place, whatever its action."""
    not_run: dict[str, str] = field(default_factory=dict)
    """By detector, why it did not run somewhere."""
    windows: int = 0
    tokens: int = 0
    """What is charged for windows and their parts."""
    variants: int = 0

    @property
    def detected(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.detected]

    @property
    def blocked(self) -> list[str]:
        """Detectors that stop the request, once each."""
        return sorted({entry.detector for entry in self.detected if entry.action == BLOCK})

    @property
    def flagged(self) -> bool:
        """Whether anything was found that is not merely reported."""
        return any(entry.action != FLAG for entry in self.detected)

    @property
    def unchecked(self) -> list[str]:
        """Detectors that should have stopped something and did not run."""
        acting = {entry.detector for entry in self.entries if entry.detected is None and entry.action != FLAG}
        return sorted(acting)

    @property
    def refused(self) -> bool:
        """Whether nobody may take this for checked."""
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
    """Return `text` with tags in the place of its masks, which are in order and disjoint."""
    parts, end = [], 0
    for span, replacement in zip(masks, tags(text, masks), strict=True):
        parts += [text[end : max(span.start, 0)], replacement]
        end = span.end
    return "".join([*parts, text[end:]])


CHARACTERS = 384
"""From the start of a window to that of the next: 96 tokens of four."""


def estimated_windows(policy: Policy, texts: Iterable[Text]) -> int:
    """Return about how many windows of the texts models were to score: what is known of the work where no answer tells it."""
    read = {
        direction
        for direction, watches in policy.directions.items()
        if any(needs_model(entry.detector) for entry in watches)
    }
    return sum(1 + len(entry.text) // CHARACTERS for entry in texts if entry.direction in read and entry.text.strip())


_JSON = re.compile(r'\s*(?:\{|\[\s*["{\[\d-])')
_QUOTE = re.compile(r'\\.|"', re.S)


def tags(text: str, masks: Sequence[Span]) -> list[str]:
    """Return what stands in the place of what was masked: `<EMAIL>`. Where `text` is JSON, what was no part of a string, such as
    a number, becomes a string."""
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
        """Check the texts of a request. everything: ask all detectors, also after one has found enough to block.

        Raises GuardDown, Late.
        """
        verdict = Verdict(policy)
        if len(texts) > MOST_TEXTS:
            for direction, watches in policy.directions.items():
                piece = _Piece(item_of(policy, "", direction), watches, 0, None)
                self._unchecked(verdict, piece, f"more than {MOST_TEXTS} texts")
            return verdict
        pieces = list(_pieces(policy, texts))
        if reason := _beyond(policy, [piece for piece in pieces if piece.number is not None]):
            for piece in pieces:
                self._unchecked(verdict, piece, reason)
            return verdict
        items = [replace(piece.item, decisive=frozenset()) if everything else piece.item for piece in pieces]
        for piece, result in zip(pieces, await self.scanned(policy, items), strict=True):
            self._add(verdict, piece, result)
        return verdict

    async def piece(self, policy: Policy, item: Item) -> Verdict:
        """Check one piece of an answer."""
        verdict = Verdict(policy)
        if item.detectors:
            (result,) = await self.scanned(policy, [item])
            self._add(verdict, _Piece(item, policy.watches(item.direction), 0, 0), result)
        return verdict

    async def scanned(self, policy: Policy, items: Sequence[Item]) -> Sequence[Result]:
        if not items:
            return []
        try:
            async with asyncio.timeout(policy.limits.seconds):
                return await self.scan(items)
        except TimeoutError:
            raise Late(f"took more than {policy.limits.seconds:g} s") from None

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
    """Return what a detector says of a text."""
    if not needs_model(watch.detector):
        finding = next((candidate for candidate in result.found if candidate.detector == watch.detector), None)
        level = CONFIDENT if finding else UNLIKELY
        return Entry(
            watch.detector, message, watch.action, finding is not None, level, finding.label if finding else ""
        )
    scored = result.scores.get(watch.detector)
    if scored is None:
        return Entry(watch.detector, message, watch.action, None, NOT_RUN)
    if scored.level is None:  # without calibration a score means nothing; half is where its training put the border
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
    """Of the text that it is of; None for several together, whose places are no places."""
    start: int = 0
    """Where it begins there."""


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
    # What was cut into several messages, or by documents, is read in one.
    for direction, group in itertools.groupby(texts, lambda placed_text: placed_text.direction):
        run = [placed_text for placed_text in group if placed_text.text.strip()]
        watches = tuple(watch for watch in policy.watches(direction) if watch.detector not in SPANS)
        if run and direction and watches:
            for text, watches_of_text in _joined(policy, run, watches):
                item = _only(item_of(policy, text, direction, prompts, public), watches_of_text)
                yield _Piece(item, watches_of_text, run[-1].message, None)


def _beyond(policy: Policy, pieces: Sequence[_Piece]) -> str:
    """Return why there is too much to look at; empty where there is not. pieces: of single texts."""
    if len(pieces) > MOST_TEXTS:  # of few texts, which markers cut into many
        return f"more than {MOST_TEXTS} texts"
    if sum(len(piece.item.text) for piece in pieces) > policy.limits.characters:
        return f"more than {policy.limits.characters} characters"
    return ""


def _only(item: Item, watches: Iterable[Watch]) -> Item:
    """Return the item with what these look for alone."""
    detectors = frozenset(watch.detector for watch in watches)
    return replace(item, detectors=detectors, decisive=item.decisive & detectors)


def _parts(policy: Policy, text: Text) -> Iterable[tuple[int, str, str]]:
    """Yield where each part of a text begins, the part, and its direction: documents between markers are tools' results where
    the policy looks at those. Else they are as the rest of the text, or nothing would look at what is typed behind a marker."""
    if not text.direction:
        return
    place = 0
    for document in _documents(policy, text) if policy.watches("tool_result") else ():
        yield place, text.text[place : document.start], text.direction
        yield document.start, text.text[document.start : document.end], "tool_result"
        place = document.end
    yield place, text.text[place:], text.direction


def _joined(policy: Policy, run: Sequence[Text], watches: tuple[Watch, ...]) -> Iterable[tuple[str, tuple[Watch, ...]]]:
    """Yield neighbouring texts of one direction in one, and what looks at them: their authors' own words, and these with the
    documents among them."""
    documents = [list(_documents(policy, placed_text)) for placed_text in run]
    own_words = [
        _without(placed_text.text, [(each.opens, each.closes) for each in documents_of_text])
        for placed_text, documents_of_text in zip(run, documents, strict=True)
    ]
    if sum(bool(part.strip()) for parts in own_words for part in parts) > 1:
        for text in _readings(own_words):
            yield text, watches
    # Half of an attack may stand in a document. A model would take all documents for the user's words, and what does not look
    # at documents otherwise does not here.
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
    """Return what is left of a text beside these places, which are in order and disjoint."""
    parts, place = [], 0
    for start, end in places:
        parts.append(text[place:start])
        place = end
    return [part for part in (*parts, text[place:]) if part]


def _readings(texts: Sequence[Sequence[str]]) -> list[str]:
    """Return the parts of several texts in one: end to end, and where that makes one word of two, with a space between them too."""
    readings = [" ".join("".join(parts) for parts in texts)]
    if any(not (first[-1].isspace() or second[0].isspace()) for parts in texts for first, second in pairwise(parts)):
        readings.append(" ".join(" ".join(parts) for parts in texts))
    return readings


@dataclass(frozen=True)
class _Document:
    """A part of a text between markers."""

    opens: int
    """Where its first marker begins."""
    start: int
    end: int
    closes: int
    """Where its second marker ends."""

    @property
    def markers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.opens, self.start), (self.end, self.closes)


def _documents(policy: Policy, text: Text) -> Iterable[_Document]:
    """Yield the documents in what a user wrote. One without its end marker goes to the end of the text."""
    if text.direction != "input" or not policy.document_markers:
        return
    ends = dict(reversed(policy.document_markers))
    opening = re.compile("|".join(map(re.escape, sorted(ends))))
    place = 0
    while (opening_match := opening.search(text.text, place)) is not None:
        end = text.text.find(ends[opening_match.group()], opening_match.end())
        end, place = (end, end + len(ends[opening_match.group()])) if end >= 0 else (len(text.text), len(text.text))
        yield _Document(opening_match.start(), opening_match.end(), end, place)
