"""Runs all detectors on a text: exact ones first, then the models on the windows of its readings."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dstune.guard.calibration import UNLIKELY
from dstune.guard.leaks import LEAST_RUNS, canaries_in, codes_of, leaked_runs
from dstune.guard.links import unknown_links
from dstune.guard.model import LONG, GuardModel, Score, Window, WindowScore, highest
from dstune.guard.normal import Normal, normalised
from dstune.guard.policy import LEAK, LINKS, PII, RULES, SECRETS, needs_model
from dstune.guard.rules import matching
from dstune.guard.variants import DECODED, Variant, variants_of

CONTEXT_TOKENS = 128
"""Tokens before a piece of a stream that are scored with it."""
CACHED_SCORES = 8192
"""Cached scores: a conversation is sent again with each of its turns."""


Search = Callable[[str], Iterator[tuple[str, int, int]]]
"""Yields the detector and place of each finding in a text."""


@dataclass(frozen=True)
class Item:
    """A text to scan."""

    text: str
    direction: str
    detectors: frozenset[str]
    context: str = ""
    """The text before it in a stream, which is searched and scored with it."""
    windows_before: int = 0
    """Earlier windows of the same answer: the thresholds are those for all of them together."""
    links: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    """System prompts, which the text must not reveal."""
    public: tuple[str, ...] = ()
    """Texts of users, which are not secret."""
    canaries: tuple[str, ...] = ()
    codes: bool = False
    decisive: frozenset[str] = frozenset()
    """Exact detectors whose findings make the models unnecessary."""
    most_windows: int = 512


@dataclass(frozen=True)
class Finding:
    """A finding of an exact detector."""

    detector: str
    start: int = 0
    end: int = 0
    """Places in the item's text. A finding that begins in the context has a negative start."""
    label: str = ""
    """The rule, or the reading with the finding; never the text found."""


@dataclass(frozen=True)
class Scored:
    level: str | None
    """None if the model has no calibration."""
    score: float
    windows: int
    variant: str


@dataclass(frozen=True)
class Result:
    """The result of one item."""

    found: tuple[Finding, ...] = ()
    scores: Mapping[str, Scored] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    """Reasons by detector."""
    computed: int = 0
    """Windows computed for it."""
    tokens: int = 0
    """Tokens to charge: its windows at the model's full length, and their parts."""
    variants: int = 0


@dataclass
class Prepared:
    """An item after its exact detectors, with the remaining work of the models."""

    item: Item
    found: tuple[Finding, ...]
    not_run: dict[str, str]
    readings: list[Variant]
    windows: dict[str, list[list[Window]]]
    """By detector and reading."""
    remembered: dict[str, Score]
    key: bytes


class Scanner:
    """Detectors and models of one process. `prepare` and `finish` may run in different threads, each in one at a time."""

    def __init__(self, models: Mapping[str, GuardModel]):
        """models: by detector (`prompt_attack`, `moderated_content/KIND`)."""
        self.models = dict(models)
        self._scores: OrderedDict[tuple[str, bytes], Score] = OrderedDict()

    @staticmethod
    def load(models: Mapping[str, Path]) -> Scanner:
        """Load the models and return their scanner. Raises UserError."""
        return Scanner({detector: GuardModel.load(path) for detector, path in models.items()})

    @property
    def calibrated(self) -> list[str]:
        return [detector for detector, model in self.models.items() if model.calibration is not None]

    def scan(self, item: Item) -> Result:
        prepared = self.prepare(item)
        scores = {
            detector: self.models[detector].score_windows([window for reading in windows for window in reading])
            for detector, windows in prepared.windows.items()
        }
        return self.finish(prepared, scores)

    def prepare(self, item: Item) -> Prepared:
        """Run the exact detectors, and cut the text into windows."""
        whole = item.context + item.text
        normal = normalised(whole)
        readings = variants_of(whole, normal)
        findings = tuple(self._exact(item, whole, normal, readings))
        not_run: dict[str, str] = {}
        windows: dict[str, list[list[Window]]] = {}
        remembered: dict[str, Score] = {}
        by_model = [entry for entry in item.detectors if needs_model(entry)]
        key = b""
        if by_model and not item.decisive.intersection(entry.detector for entry in findings):
            # A piece of a stream is scored with the last words before it only, not with the full search context.
            scored = readings
            if item.context:
                tail = self._tail(item.context)
                scored = variants_of(tail + item.text, normalised(tail + item.text))
            text = "\0".join([str(min(item.windows_before, LONG)), *(entry.text for entry in scored)])
            key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            for detector in by_model:
                model = self.models.get(detector)
                if model is None:
                    not_run[detector] = "no model"
                elif (score := self._scores.get((detector, key))) is not None:
                    remembered[detector] = score
                else:
                    pieces = [model.windows(entry.text, item.windows_before) for entry in scored]
                    if sum(map(len, pieces)) > item.most_windows:
                        not_run[detector] = f"more than {item.most_windows} windows"
                    else:
                        windows[detector] = pieces
            readings = scored
        return Prepared(item, findings, not_run, readings, windows, remembered, key)

    def _tail(self, context: str) -> str:
        for model in self.models.values():
            return model.tail(context, CONTEXT_TOKENS)
        return context

    def finish(self, prepared: Prepared, scores: Mapping[str, Sequence[WindowScore]]) -> Result:
        """Combine a text's scores. scores: by detector, those of all windows in the order of `prepared.windows`."""
        item, computed, tokens = prepared.item, 0, 0.0
        scored: dict[str, Scored] = {}
        score_by_detector = dict(prepared.remembered)
        for detector, pieces in prepared.windows.items():
            flat = iter(scores[detector])
            score_by_detector[detector] = highest(
                prepared.readings, [[next(flat) for _ in of_reading] for of_reading in pieces]
            )
            computed += score_by_detector[detector].windows
            work = score_by_detector[detector].windows + sum(window_score.parts for window_score in scores[detector])
            tokens += work * self.models[detector].window_tokens
            self._remember(detector, prepared.key, score_by_detector[detector])
        for detector, score in score_by_detector.items():
            calibration = self.models[detector].calibration
            windows = max(score.windows + item.windows_before, 1)
            level = None
            if calibration is not None:
                level = calibration.level(item.direction, windows, score.value) if score.windows else UNLIKELY
            scored[detector] = Scored(level, score.value, score.windows, score.variant)
        return Result(prepared.found, scored, prepared.not_run, computed, math.ceil(tokens), len(prepared.readings))

    def _remember(self, detector: str, key: bytes, score: Score) -> None:
        self._scores[detector, key] = score
        while len(self._scores) > CACHED_SCORES:
            self._scores.popitem(last=False)

    # -- exact detectors

    def _exact(self, item: Item, whole: str, normal: Normal, readings: Sequence[Variant]) -> Iterator[Finding]:
        context_length = len(item.context)

        def at(detector: str, start: int, end: int, label: str = "") -> Iterator[Finding]:
            if end > context_length:  # findings that end in the context were reported with it
                yield Finding(detector, start - context_length, end - context_length, label)

        for detector, start, end, label in self._spans(item, normal, readings):
            yield from at(detector, start, end, label)
        if RULES in item.detectors:
            for reading in readings:
                for rule in matching(reading.text, tool_result=item.direction == "tool_result"):
                    yield from at(RULES, reading.start, reading.end, rule.name)
        if LEAK in item.detectors:
            canaries = [*item.canaries, *(codes_of(item.prompts) if item.codes else ())]
            if canaries_in(readings, canaries, item.public):
                yield from at(LEAK, 0, len(whole), "canary")
            if leaked_runs(readings, item.prompts, item.public) >= LEAST_RUNS:
                yield from at(LEAK, 0, len(whole), "wording")

    @staticmethod
    def _spans(item: Item, normal: Normal, readings: Sequence[Variant]) -> Iterator[tuple[str, int, int, str]]:
        searches: list[tuple[Collection[str], Search]] = [
            (frozenset(PII.values()), _personal_data),
            ((SECRETS,), _secrets),
            ((LINKS,), lambda text: ((LINKS, start, end) for start, end in unknown_links(text, item.links))),
        ]
        for detectors, search in searches:
            if item.detectors.isdisjoint(detectors):
                continue
            seen = []
            for detector, start, end in search(normal.text):
                if detector in item.detectors:
                    span = normal.span(start, end)
                    seen.append((detector, span[0]))
                    yield detector, *span, ""
            for reading in readings:
                if reading.name in DECODED:
                    yield from _encoded(reading, search, item.detectors, seen)


def _encoded(
    reading: Variant, search: Search, chosen: Collection[str], seen: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, int, int, str]]:
    """Yield findings in decoded text. A finding covers the complete encoded run, or all runs if it was split over several. seen:
    findings in plain text, which need no second one at the same place."""
    detectors_found = set()
    for part in reading.parts or (reading,):
        for detector in {kind for kind, _, _ in search(part.text)}.intersection(chosen):
            detectors_found.add(detector)
            if not any(kind == detector and part.start <= start < part.end for kind, start in seen):
                yield detector, part.start, part.end, reading.name
    if len(reading.parts) > 1:
        for glue in ("", " "):
            joined = glue.join(part.text for part in reading.parts)
            for detector in {kind for kind, _, _ in search(joined)}.intersection(chosen) - detectors_found:
                detectors_found.add(detector)
                yield detector, reading.start, reading.end, reading.name


def _personal_data(text: str) -> Iterator[tuple[str, int, int]]:
    from dstune.data.clean.sensitive import find_personal_data

    return ((PII[finding.kind], finding.start, finding.end) for finding in find_personal_data(text))


def _secrets(text: str) -> Iterator[tuple[str, int, int]]:
    from dstune.data.clean.sensitive import find_secrets

    return ((SECRETS, finding.start, finding.end) for finding in find_secrets(text))
