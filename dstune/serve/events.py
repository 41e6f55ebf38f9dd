"""Reads server-sent events, as in https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.serve.engines.http import within_event

EVENT_END = re.compile(rb"[\r\n](?:(?<=\n)\n|\r(?!\Z)\n?)")
"""An empty line after the end of another line, in the bytes received so far: a trailing carriage return may be half of a line's
end."""
MOST_END_BYTES = 4
_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DONE = b"[DONE]"
"""The data of the last event of a stream in OpenAI's API."""


class EventReader:
    """Reads the data of events whose bytes arrive in pieces. Comments, and events without data, are skipped."""

    def __init__(self) -> None:
        self._buffer = b""
        self._begins = True

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of the events that end in `chunk`. Raises one of FAILURES if an event grows without an end."""
        searched = max(len(self._buffer) - MOST_END_BYTES, 0)  # an event's end may begin in the previous chunk
        self._buffer += chunk
        if self._begins and len(self._buffer) >= len(_BYTE_ORDER_MARK):
            self._begins = False
            self._buffer = self._buffer.removeprefix(_BYTE_ORDER_MARK)
        start = 0
        for end in EVENT_END.finditer(self._buffer, searched):
            if data := event_data(self._buffer[start : end.start()]):
                yield data
            start = end.end()
        self._buffer = within_event(self._buffer[start:])

    def end(self) -> Iterator[bytes]:
        """Yield the data of an event that the stream's end has cut off: the specification drops it, but some clients read it."""
        if data := event_data(self._buffer.removeprefix(_BYTE_ORDER_MARK)):
            yield data


def event_data(event: bytes) -> bytes:
    """Return the data lines of an event, joined by line feeds."""
    lines = (line.partition(b":") for line in _LINE_END.split(event))
    return b"\n".join(value.removeprefix(b" ") for name, _, value in lines if name == b"data")


def stream_data(stream: bytes) -> Iterator[bytes]:
    """Yield the data of all events of a complete stream."""
    reader = EventReader()
    yield from reader.feed(stream)
    yield from reader.end()
