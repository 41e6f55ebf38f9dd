"""Parses multipart/form-data as it arrives: the file goes straight to disk, the other fields are limited in size."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from dstune.finetuning.blobs import CHUNK, Blobs, Staged
from dstune.finetuning.fields import invalid, is_text
from dstune.serve.errors import ApiError
from dstune.serve.gateway.request import Request

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD_BYTES = 65_536
"""Limit of all fields together."""
LEAST_BYTES_A_SECOND = 16_384
WINDOW_SECONDS = 30.0
"""A body must arrive at the minimum rate in each window; otherwise a slow upload would keep its place for days."""
AROUND_BYTES = 262_144
"""What a body may have beside the file: fields, headers and boundaries."""


@dataclass
class Form:
    fields: dict[str, str]
    filename: str
    file: Staged
    """Complete and on disk; the caller keeps or discards it."""


async def read_form(
    request: Request, blobs: Blobs, *, file: str, fields: Collection[str], most: int, prefix: str = "blob-"
) -> Form:
    """Parse the body of a request. file: the name of the file part; most: its size limit in bytes; prefix: of the id under which it
    is stored. Raises ApiError, ClientGone; nothing is left on disk then."""
    kind, options = parse_options_header(request.header("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(400, "The body must be multipart/form-data with a boundary.")
    if request.header("content-encoding") not in ("", "identity"):
        raise ApiError(400, "The body must not be compressed.")
    with blobs.receiving.place(request.key):
        reader = _Reader(blobs, file, fields, most, prefix)
        try:
            await _read(request, reader, boundary)
            return reader.form()
        except FormParserError:
            reader.discard()
            raise ApiError(400, "The body is not valid multipart/form-data.") from None
        except BaseException:
            reader.discard()
            raise


async def _read(request: Request, reader: _Reader, boundary: bytes) -> None:
    parser = MultipartParser(boundary, reader.callbacks())
    began, size = time.monotonic(), 0
    async for chunk in request.chunks(reader.most + AROUND_BYTES):
        size += len(chunk)
        seconds = time.monotonic() - began
        if seconds >= WINDOW_SECONDS:
            if size < seconds * LEAST_BYTES_A_SECOND:
                raise ApiError(408, f"The body arrives at less than {LEAST_BYTES_A_SECOND} bytes per second.")
            began, size = time.monotonic(), 0
        parser.write(chunk)
        if reader.waiting >= CHUNK:
            waited = time.monotonic()
            await asyncio.to_thread(reader.flush)
            began += time.monotonic() - waited  # time spent on the disk does not count against the client
    parser.finalize()
    if not reader.ended:
        raise ApiError(400, "The body ends in the middle.")
    await asyncio.to_thread(reader.finish)


@dataclass
class _Reader:
    """Callbacks of the multipart parser."""

    blobs: Blobs
    file: str
    known: Collection[str]
    most: int
    prefix: str
    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    staged: Staged | None = None
    ended: bool = False
    waiting: int = 0
    """Bytes of the file that have not been written yet."""
    _chunks: list[bytes] = field(default_factory=list)
    _size: int = 0
    _field_bytes: int = 0
    _name: str = ""
    _in_file: bool = False
    _text: bytearray = field(default_factory=bytearray)
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _disposition: str = ""

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._on_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._disposition, self._text = "", bytearray()

    def _header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = value.decode("latin-1")
        self._header = (bytearray(), bytearray())

    def _headers_end(self) -> None:
        kind, options = parse_options_header(self._disposition)
        self._name = _text(options.get(b"name", b""))
        if kind != b"form-data" or not self._name:
            raise ApiError(400, "A part of the body has no name.")
        excerpt = self._name[:80]
        if self._name == self.file:
            if self.staged is not None:
                raise ApiError(400, f"{self.file!r} is there twice.", param=self.file)
            if b"filename" not in options:
                raise ApiError(400, f"{self.file!r} must be a file, with a filename.", param=self.file)
            self.filename, self.staged, self._in_file = (
                _label(options[b"filename"]),
                self.blobs.stage(self.prefix),
                True,
            )
            return
        if self._name not in self.known:
            raise ApiError(400, f"Unknown field: {excerpt!r}.", param=excerpt, code="unknown_parameter")
        if self._name in self.fields:
            raise ApiError(400, f"{excerpt!r} is there twice.", param=excerpt)

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        length = end - start
        if self._in_file:
            self._size += length
            if self._size > self.most:
                message = f"The file has more than {self.most} bytes."
                raise ApiError(413, message, param=self.file, code="file_too_large")
            self._chunks.append(data[start:end])
            self.waiting += length
            return
        self._field_bytes += length
        if self._field_bytes > FIELD_BYTES:
            raise ApiError(413, f"The fields have more than {FIELD_BYTES} bytes.", code="request_too_large")
        self._text += data[start:end]

    def _on_part_end(self) -> None:
        if not self._in_file:
            try:
                self.fields[self._name] = self._text.decode()
            except UnicodeDecodeError:
                raise ApiError(400, f"{self._name[:80]!r} is not UTF-8.", param=self._name[:80]) from None
        self._in_file = False

    def _on_end(self) -> None:
        self.ended = True

    def flush(self) -> None:
        assert self.staged is not None
        self.staged.write(b"".join(self._chunks))
        self._chunks, self.waiting = [], 0

    def finish(self) -> None:
        if self.staged is None:
            message = f"Missing required field: {self.file!r}."
            raise ApiError(400, message, param=self.file, code="missing_required_parameter")
        if self._size == 0:
            raise ApiError(400, f"{self.file!r} is empty.", param=self.file, code="empty_file")
        self.flush()
        self.staged.close()

    def form(self) -> Form:
        assert self.staged is not None
        return Form(self.fields, self.filename, self.staged)

    def discard(self) -> None:
        if self.staged is not None:
            self.staged.discard()


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _label(value: bytes) -> str:
    """Return a file name, with quotes and line breaks unescaped as clients escape them. It is only displayed, never used as a path.
    Raises ApiError."""
    name = _text(value).replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")
    return checked_filename(name)


def checked_filename(name: object) -> str:
    """Return the name of an uploaded file if it is valid. Raises ApiError."""
    if not is_text(name, 512):
        raise invalid("filename", "a text of 1 to 512 characters")
    return name
