"""What the launching process shows: stages, rank 0's output, and why a run ended.

Rank 0 ends transient lines (progress) with a carriage return instead of a line feed. They reach a terminal only, never
a pipe, a file or the log.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from typing import BinaryIO, TextIO

SEGMENT = re.compile(rb"[^\r\n]*(?:\r?\n|\r(?!\n))")


class Console:
    """Writes to the user from two threads: the launcher's own messages and rank 0's output.

    out: where rank 0's output goes: stdout, or stderr if stdout must stay machine-readable. Messages go to stderr. If the reader
    goes away (`| head`, a closed terminal), the run continues without a console.
    """

    def __init__(self, out: TextIO | None = None):
        self._out = out or sys.stdout
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._transient_line: bytes | None = None
        """The transient line that the terminal shows now; it is erased first, since a shorter line would not cover all of it."""

    @property
    def out(self) -> TextIO:
        return self._out

    @property
    def kind(self) -> str:
        """`tty:WIDTH` or `plain`, for DSTUNE_CONSOLE."""
        return f"tty:{width(self._out)}" if self._is_terminal(self._out) else "plain"

    def stage(self, text: str) -> None:
        """Report a step of the launch with the seconds since the command started."""
        self.message(f"dstune [{time.monotonic() - self._started:5.1f} s] {text}")

    def message(self, text: str) -> None:
        """Print a line of the launcher's own on stderr."""
        with self._lock:
            self._clear()
            self._write(sys.stderr, f"{text}\n".encode())

    def forward(self, data: bytes) -> None:
        """Forward complete lines of rank 0's output; transient ones only to a terminal."""
        with self._lock:
            for segment in SEGMENT.findall(data):
                transient = segment.endswith(b"\r")
                if transient and not self._is_terminal(self._out):
                    continue
                if not transient:
                    self._clear()
                self._write(self._out, segment)
                self._transient_line = segment if transient and segment.strip() else None

    def close(self) -> None:
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        if self._transient_line is not None:
            length = len(self._transient_line.rstrip(b"\r").decode(errors="replace"))
            self._write(self._out, b" " * length + b"\r")
            self._transient_line = None

    @staticmethod
    def _is_terminal(stream: TextIO) -> bool:
        try:
            return stream.isatty()
        except ValueError:  # closed
            return False

    @staticmethod
    def _write(stream: TextIO, data: bytes) -> None:
        try:
            stream.flush()
            if hasattr(stream, "buffer"):
                stream.buffer.write(data)
                stream.buffer.flush()
            else:
                stream.write(data.decode(errors="replace"))
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            mute(stream)


def width(terminal: TextIO) -> int:
    """Return the columns of this terminal.

    An exported COLUMNS may belong to another terminal or predate a resize, so it counts only if the terminal reports no width.
    """
    with contextlib.suppress(OSError, ValueError):
        if columns := os.get_terminal_size(terminal.fileno()).columns:
            return columns
    return shutil.get_terminal_size().columns


def mute(stream: TextIO) -> None:
    """Discard buffered and future output of `stream`, because its reader has gone."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


class Splitter:
    """Splits rank 0's output into lines, and copies all but the transient ones into the rank's log."""

    def __init__(self, console: Console, log: BinaryIO):
        self._console = console
        self._log = log
        self._partial_line = b""

    def feed(self, data: bytes) -> None:
        """Process the next bytes, which may end anywhere in a line."""
        data = self._partial_line + data
        segments = SEGMENT.findall(data)
        complete_lines = b"".join(segments)
        self._partial_line = data[len(complete_lines) :]
        try:
            self._log.write(b"".join(segment for segment in segments if not segment.endswith(b"\r")))
            self._log.flush()
        except (OSError, ValueError):
            pass  # a full disk loses log lines; rank 0 must not block on a pipe that nobody reads
        self._console.forward(complete_lines)

    def end(self) -> None:
        """Forward an unfinished last line, once the output has ended."""
        if self._partial_line:
            self.feed(b"\n")


def copy(descriptor: int, console: Console, log: BinaryIO) -> None:
    """Copy everything from `descriptor` to the console and the log, until every process has closed the other end."""
    splitter = Splitter(console, log)
    while data := os.read(descriptor, 65536):
        splitter.feed(data)
    splitter.end()
