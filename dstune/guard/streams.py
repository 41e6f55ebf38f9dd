"""Holds back a streamed answer until it is checked, then passes it on as the engine wrote it. Text waits for the end of a sentence
or HELD characters (about 48 tokens), and its last KEPT characters wait for what follows, where a card number or a key may continue.
It is checked together with the text before it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from operator import setitem
from typing import Any

from dstune.guard.bodies import REVEALING_FIELDS, Place, is_name, texts_in
from dstune.guard.check import Span, Verdict, tags
from dstune.serve.asgi import event
from dstune.serve.engines.http import object_of, of_its_shape
from dstune.serve.events import DONE, EventReader

HELD = 192
KEPT = 64
"""The longest card number, IBAN or prefix by which a key is recognized."""
LONGEST_WORD = 192
"""An e-mail address is one word: a word is held until its end, up to this many characters."""
LONGEST_FINDING = 8192
"""A finding at the end of the text may continue; it is held no longer than this. Then its mask is sent, and so is the mask of its
continuation: a private key without an end would be searched from its beginning with each piece."""
CONTEXT = 2000
"""Characters before a piece that are searched with it."""
HEAD = 256
"""The first characters of a finding whose mask was sent before its end. They are searched before the context, since the finding is
recognized by them."""
_SENTENCE = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"')\]\u201d\u2019]*\s+|\n\s*")
_WORD = re.compile(r"\S*")

Check = Callable[[str, str, int], Awaitable[Verdict]]
"""Checks a text, given its context and its number of earlier windows. Raises GuardDown."""


class Stopped(Exception):
    """The answer ends here, because of these detectors."""

    def __init__(self, detectors: list[str]):
        super().__init__(", ".join(detectors))
        self.detectors = detectors


@dataclass
class Channel:
    """One text of an answer: a choice's content, its reasoning, a tool call's arguments."""

    text: str = ""
    released: int = 0
    checked: int = 0
    windows: int = 0
    elsewhere: int = 0
    """Characters added to other channels since this one was last extended."""
    masks: list[Span] = field(default_factory=list)
    """In order and disjoint."""
    head: str = ""
    """The beginning of the finding whose mask has been sent and which may continue."""

    def due(self) -> bool:
        waiting = self.text[self.checked :]
        return len(waiting) >= HELD or (len(waiting) >= 16 and _SENTENCE.search(waiting) is not None)

    async def advance(self, check: Check, *, final: bool) -> None:
        """Check the new text and release what may be sent. Raises Stopped, GuardDown."""
        if self.checked == len(self.text) and not (final and self.released < len(self.text)):
            return
        length = len(self.text)
        if self.checked < length:
            start = self.released
            context = self.head + self.text[max(0, start - CONTEXT) : start]
            verdict = await check(context, self.text[start:], self.windows)
            self.windows += verdict.windows
            if verdict.blocked:
                raise Stopped(verdict.blocked)
            self._mask(verdict)
            self.checked = length
        released_before = self.released
        self.released = length if final else max(released_before, self._free(length))
        self._keep_head(released_before)

    def _mask(self, verdict: Verdict) -> None:
        """Replace the masks from `released` on by new findings."""
        start = self.released
        while self.masks and self.masks[-1].start >= start:
            self.masks.pop()
        if self.masks and self.masks[-1].end > start:
            self.masks[-1] = replace(self.masks[-1], end=start)
        word = _WORD.match(self.text, start) if self.head else None
        if (
            word is not None
        ):  # an unfinished finding may no longer be recognized, so its mask extends to the end of the word
            self.masks[-1] = replace(self.masks[-1], end=word.end())
        for span in verdict.masks().get(0, []):
            begin, end = start + max(span.start, 0), start + span.end
            if self.masks and (begin < self.masks[-1].end or (span.start < 0 and self.masks[-1].end == start)):
                self.masks[-1] = replace(self.masks[-1], end=max(end, self.masks[-1].end))
            else:
                self.masks.append(replace(span, start=begin, end=end))

    def _keep_head(self, released_before: int) -> None:
        """Keep the beginning of the finding that contains `released`. released_before: the previous value, from which the finding
        was searched."""
        within = next((mask for mask in reversed(self.masks) if mask.start < self.released), None)
        if within is None or not (within.end > self.released or within.end == self.checked):
            self.head = ""
        elif within.start >= released_before or not self.head:
            self.head = self.text[within.start : within.start + HEAD]

    def _free(self, length: int) -> int:
        """Return the end of the text that cannot change any more."""
        place = max(length - KEPT, 0)
        word = place
        while word > max(place - LONGEST_WORD, 0) and not self.text[word - 1].isspace():
            word -= 1
        free = word
        for match in _SENTENCE.finditer(self.text, self.released):
            if not any(character.isdigit() for character in self.text[max(match.start() - 24, 0) : match.end() + 2]):
                free = max(free, match.end())
        for mask in reversed(self.masks):
            if mask.end <= self.released:
                break
            unfinished = free < mask.end or mask.end == length
            if mask.start < free and unfinished and length - mask.start < LONGEST_FINDING:
                free = mask.start
        return free

    def visible(self, start: int, end: int) -> str:
        """Return `text[start:end]` with masks applied."""
        parts, place = [], start
        first = bisect_right(self.masks, start, key=lambda mask: mask.end)
        masks = list(takewhile(lambda mask: mask.start < end, self.masks[first:]))
        for mask, replacement in zip(masks, tags(self.text, masks), strict=True):
            parts.append(self.text[place : max(mask.start, place)])
            if mask.start >= start:
                parts.append(replacement)
            place = max(place, min(mask.end, end))
        return "".join([*parts, self.text[place:end]])


Part = tuple[str, int, int]
"""The name of a channel, and a range of its characters."""


@dataclass
class _Event:
    value: dict[str, Any]
    parts: list[tuple[Callable[[str], None], Part]]
    """Functions that replace the event's texts, each with its range."""


@dataclass
class _Choice:
    channels: dict[str, Channel] = field(default_factory=dict)
    events: deque[_Event] = field(default_factory=deque)
    masked: bool = False
    finished: bool = False
    """Whether the engine has ended it; its end may still be held back."""
    ended: bool = False
    """Whether its end has been sent."""
    stopped: bool = False
    """Whether the guard ended it: nothing more of it is sent."""


class HeldBack:
    """Holds back the events of a chat or text completion. choices: their number."""

    def __init__(self, check: Check, choices: int = 1):
        self._check = check
        self._expected = choices
        self._choices: dict[int, _Choice] = {}
        self._last: dict[str, Any] = {}
        self._closing: list[bytes] = []

    async def stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield events once they may be sent. A blocked choice ends with an event with `content_filter`; when all choices have
        ended, the stream ends. Raises Stopped then, and GuardDown."""
        reader = EventReader()
        try:
            async for chunk in chunks:
                for data in reader.feed(chunk):
                    async for out in self._event(data):
                        yield out
            for data in reader.end():
                async for out in self._event(data):
                    yield out
            async for out in self._finish():
                yield out
        except Stopped:
            yield b"data: [DONE]\n\n"
            raise

    async def _advance(self, number: int, choice: _Choice, final: Callable[[Channel], bool]) -> AsyncIterator[bytes]:
        """Yield the events of a choice that may be sent now. Raises Stopped if it was the last one."""
        stopped = None
        try:
            for channel in choice.channels.values():
                if (last := final(channel)) or channel.due():
                    await channel.advance(self._check, final=last)
        except Stopped as stop:
            stopped = stop
            choice.ended = choice.stopped = True
        for out in [event(self._stop(number))] if stopped else self._free(choice):
            yield out
        if stopped and sum(other_choice.ended for other_choice in self._choices.values()) >= max(
            self._expected, len(self._choices)
        ):
            raise stopped

    def _stop(self, number: int) -> dict[str, Any]:
        envelope = {key: value for key, value in self._last.items() if key not in ("choices", "usage")}
        kind: dict[str, Any] = {"text": ""} if self._last.get("object") == "text_completion" else {"delta": {}}
        return envelope | {"choices": [{"index": number, **kind, "finish_reason": "content_filter"}]}

    async def _event(self, data: bytes) -> AsyncIterator[bytes]:
        if data.strip() == DONE:
            self._closing.append(b"data: [DONE]\n\n")
            return
        value = object_of(data)
        choices = value.get("choices")
        if not isinstance(choices, list):
            choices = []
        await self._check_outside_choices(choices, value)
        if not choices:
            self._closing.append(event(value))  # usage, or an error
            return
        self._last = value
        for choice in choices:
            async for out in self._of_choice(value | {"choices": [choice]}, choice):
                yield out

    async def _check_outside_choices(self, choices: list[Any], value: dict[str, Any]) -> None:
        """Mask texts outside the choices of an event, such as an error. Raises Stopped, GuardDown."""
        for place, text in texts_in({name: item for name, item in value.items() if item is not choices}):
            if len(place) == 1 and is_name(place[0], text):
                continue
            channel = Channel(text)
            await channel.advance(self._check, final=True)
            if (visible := channel.visible(0, len(text))) != text:
                setitem(_holder(value, place), place[-1], visible)

    async def _of_choice(self, value: dict[str, Any], choice: dict[str, Any]) -> AsyncIterator[bytes]:
        with of_its_shape():
            number = int(choice.get("index", 0))
            state, texts = self._choices.setdefault(number, _Choice()), _texts(choice)
        if state.stopped:
            return
        ends = choice.get("finish_reason") is not None
        if not texts and not ends:  # it describes text that the engine holds back, and that has not been checked
            _remove_revealing_fields(choice)
        parts = []
        for channel in state.channels.values():
            channel.elsewhere += sum(len(text) for _, text, _ in texts)
        for name, text, change in texts:
            channel = state.channels.setdefault(name, Channel())
            parts.append((change, (name, len(channel.text), len(channel.text) + len(text))))
            channel.text += text
            channel.elsewhere = 0
        state.events.append(_Event(value, parts))
        state.finished = state.finished or ends
        # If another channel has text now, release the waiting one; otherwise everything after it would wait too.
        async for out in self._advance(number, state, lambda channel: state.finished or channel.elsewhere >= KEPT):
            yield out

    def _free(self, choice: _Choice) -> list[bytes]:
        chunks = []
        while choice.events and all(
            end <= choice.channels[name].released for _, (name, _, end) in choice.events[0].parts
        ):
            chunks.append(self._written(choice, choice.events.popleft()))
        return chunks

    def _written(self, state: _Choice, held_event: _Event) -> bytes:
        for change, (name, start, end) in held_event.parts:
            channel = state.channels[name]
            visible = channel.visible(start, end)
            if visible != channel.text[start:end]:
                state.masked = True
                change(visible)
                _remove_revealing_fields(held_event.value["choices"][0])
        choice = held_event.value["choices"][0]
        if state.masked and not held_event.parts:  # the last event may contain the tokens of the complete answer
            _remove_revealing_fields(choice)
        state.ended = state.ended or choice.get("finish_reason") is not None
        return event(held_event.value)

    async def _finish(self) -> AsyncIterator[bytes]:
        for number, choice in sorted(self._choices.items()):
            if not choice.stopped:
                async for out in self._advance(number, choice, lambda channel: True):
                    yield out
        for out in self._closing:
            yield out


def _holder(value: Any, place: Place) -> Any:
    for key in place[:-1]:
        value = value[key]
    return value


def _remove_revealing_fields(choice: dict[str, Any]) -> None:
    for name in REVEALING_FIELDS:
        choice.pop(name, None)


def _texts(choice: dict[str, Any]) -> list[tuple[str, str, Callable[[str], None]]]:
    """Return the texts of a choice's piece: the name of its channel, the text, and a function that replaces it."""
    texts: list[tuple[str, str, Callable[[str], None]]] = []
    for place, text in texts_in(choice, skipped_keys=REVEALING_FIELDS):
        if not text:
            continue
        holder: Any = choice
        name: list[str] = []
        for key in place[:-1]:
            holder = holder[key]
            # Calls may come in any order; each has an index.
            name.append(str(holder.get("index", key) if isinstance(holder, dict) and isinstance(key, int) else key))
        change = partial(setitem, holder, place[-1])
        texts.append((".".join([*name, str(place[-1])]), text, change))
    return texts
