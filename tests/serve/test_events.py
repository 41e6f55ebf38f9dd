"""Server-sent events: what a client that follows the specification reads, however the bytes are cut."""

from __future__ import annotations

import pytest

from dstune.serve.events import EventReader, stream_data

CASES = {
    "line feeds": (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    "carriage returns": (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    "both": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "mixed": (b"data: a\n\r\ndata: b\r\n\rdata: c\r\n\n", [b"a", b"b", b"c"]),
    "no space": (b"data:a\n\n", [b"a"]),
    "one space alone is taken off": (b"data:  a\n\n", [b" a"]),
    "several lines": (b"data: a\ndata:b\ndata\n\n", [b"a\nb\n"]),
    "lines that end alike in one event": (b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"]),
    "comments and other fields": (b": a\nevent: x\nid: 1\nretry: 5\ndata: b\nDATA: c\ndata : d\n\n", [b"b"]),
    "nothing": (b": a\n\n\n\nevent: x\n\n", []),
    "a byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    "a mark further on": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
    "a mark and nothing": (b"\xef\xbb\xbf", []),
    "cut": (b"data: a\n\ndata: b", [b"a", b"b"]),
}


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("case", CASES)
def test_events_are_read_as_the_specification_says(case, size):
    stream, expected = CASES[case]
    reader = EventReader()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    found = [data for piece in pieces for data in reader.feed(piece)]
    assert [*found, *reader.end()] == expected == list(stream_data(stream))
