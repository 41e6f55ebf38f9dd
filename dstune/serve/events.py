"""Server-sent events, read as https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dstune.serve.engines.http import within_event

EVENT_END = re.compile(rb"[\r\n](?:(?<=\n)\n|\r(?!\Z)\n?)")
"""An empty line behind the end of another one, in what has come of a stream: a carriage return at its end may be half of a
line's end."""
MOST_END_BYTES = 4
_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DONE = b"[DONE]"
"""The data of the last event of OpenAI's API."""


class EventReader:
    """The data of events whose bytes come in pieces. Comments, and events without data, are none."""

    def __init__(self) -> None:
        self._buffer = b""
        self._begins = True

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of the events that end in `chunk`. Raises one of FAILURES where an event has no end."""
        searched = max(len(self._buffer) - MOST_END_BYTES, 0)  # an end may begin in the piece before
        self._buffer += chunk
        if self._begins and len(self._buffer) >= len(_BYTE_ORDER_MARK):
            self._begins = False
            self._buffer = self._buffer.removeprefix(_BYTE_ORDER_MARK)
        start = 0
        for end in EVENT_END.finditer(self._buffer, searched):
            if data := data_of(self._buffer[start : end.start()]):
                yield data
            start = end.end()
        self._buffer = within_event(self._buffer[start:])

    def end(self) -> Iterator[bytes]:
        """Yield the data of an event that the stream's end has cut: the specification drops it, some clients read it."""
        if data := data_of(self._buffer.removeprefix(_BYTE_ORDER_MARK)):
            yield data


def data_of(event: bytes) -> bytes:
    """Return the lines of its data, joined by line feeds."""
    lines = (line.partition(b":") for line in _LINE_END.split(event))
    return b"\n".join(value.removeprefix(b" ") for name, _, value in lines if name == b"data")


def data_in(stream: bytes) -> Iterator[bytes]:
    """Yield the data of all events of a stream that is there as a whole."""
    reader = EventReader()
    yield from reader.feed(stream)
    yield from reader.end()
