"""Decodes images of strangers in a child process with limits of processor time and memory: `python -m dstune.data.images.decoder`.

A decoder is C code that checks for no signals, so that only its process can be ended. A file of a few bytes may ask for
gigabytes (a tile of a TIFF) or minutes (a JPEG with thousands of scans). Each thread has a child of its own, which decodes one
image after the other, gets no variables, and ends with its parent.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from dstune.core.child_python import child_environment
from dstune.core.errors import first_line
from dstune.core.limits import readable
from dstune.data.problems import RowError

SECONDS, SECONDS_PER_PIXEL = 1.5, 1e-7
"""Processor time of one image: as for a chat template, and 0.1 s more for each million pixels."""
MEMORY_BYTES = 3 * 2**29
"""Memory of the child in addition to its imports. The largest image allowed, with transparency, takes 1.3 GiB."""
START_SECONDS = 120.0
WALL = 20
"""Multiple of the processor time after which a child is ended, whatever it does."""
_HEAD = struct.Struct("<cIIQ")
"""Answer: whether it is an image, width, height, number of bytes that follow."""
_children = threading.local()


class _Child:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dstune.data.images.decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment({}),
            cwd="/",
        )
        self._read(1, time.monotonic() + START_SECONDS)

    def decode(self, content: bytes, seconds: float) -> Any:
        """Return the image. Raises RowError, also EOFError or OSError if the child was ended."""
        from PIL import Image

        stdin = self.process.stdin
        assert stdin is not None
        deadline = time.monotonic() + WALL * seconds
        stdin.write(struct.pack("<dQ", seconds, len(content)) + content)
        stdin.flush()
        kind, width, height, size = _HEAD.unpack(self._read(_HEAD.size, deadline))
        answer = self._read(size, deadline)
        if kind != b"i":
            raise RowError(answer.decode())
        return Image.frombytes("RGB", (width, height), answer)

    def _read(self, size: int, deadline: float) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        content = bytearray()
        while len(content) < size:
            if not readable(stdout.fileno(), max(0.0, deadline - time.monotonic())):
                raise EOFError
            part = os.read(stdout.fileno(), min(2**20, size - len(content)))
            if not part:
                raise EOFError
            content += part
        return bytes(content)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()

    def __del__(self) -> None:
        if self.pid == os.getpid():  # with its thread
            with suppress(Exception):
                self.end()


def decode(content: bytes, size: tuple[int, int]) -> Any:
    """Return the image in these bytes as an RGB PIL image. size: as its head says. Raises RowError."""
    child: _Child | None = getattr(_children, "child", None)
    if child is None or child.pid != os.getpid():  # a fork shares the pipes of its parent's child
        child = _children.child = _Child()
    seconds = SECONDS + SECONDS_PER_PIXEL * size[0] * size[1]
    try:
        return child.decode(content, seconds)
    except (EOFError, OSError):
        _children.child = None
        child.end()
        reason = f"takes more than {seconds:.1f} s or {MEMORY_BYTES / 2**30:g} GiB to decode, or ends the process"
        raise RowError(reason) from None


def main() -> None:
    from dstune.data.images.store import decode_here

    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of a library must not mix with the answers
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the kernel ends this process, whatever it is in
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[5]) * resource.getpagesize() + MEMORY_BYTES
    stdout.write(b"r")
    stdout.flush()
    while head := stdin.read(16):
        seconds, size = struct.unpack("<dQ", head)
        content = stdin.read(size)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        try:
            image = decode_here(content)
            answer = image.tobytes()
            shape = image.size
            kind = b"i"
        except (RowError, MemoryError) as error:
            kind, shape, answer = b"e", (0, 0), (first_line(error) or "takes too much memory to decode").encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        stdout.write(_HEAD.pack(kind, *shape, len(answer)))
        stdout.write(answer)
        stdout.flush()
        image = answer = content = b""


if __name__ == "__main__":
    main()
