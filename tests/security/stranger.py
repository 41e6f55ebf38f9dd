"""What another user of the machine tries against a running launch: `stranger.py JSON`; prints one line for each attempt that
went further than it should."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

given: dict[str, Any] = json.loads(sys.argv[1])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path(given["sentinel"]).write_text, ("ran",))


def attempt(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError:
        return
    print(f"could {what}", flush=True)


for pid in given["pids"]:
    for name in ("environ", "fd", "maps", "mem"):
        path = Path(f"/proc/{pid}/{name}")
        attempt(f"read {path}", lambda path=path: os.listdir(path) if path.name == "fd" else path.open("rb").read(1))
    attempt(f"signal {pid}", lambda pid=pid: os.kill(pid, signal.SIGTERM))
for line in given["kept"]:
    attempt(f"read {line}", lambda line=line: os.listdir(line) if os.path.isdir(line) else Path(line).read_bytes())
for line in [*given["kept"], *given["public"]]:
    path = Path(line)
    if os.path.isdir(path):
        attempt(f"make a file in {path}", lambda path=path: (path / "planted").write_text("x"))
        attempt(f"replace {path}", lambda path=path: path.rename(path.with_name(f"{path.name}.gone")))
    else:
        attempt(f"write {path}", lambda path=path: path.open("ab").write(b"x"))
        attempt(f"replace {path}", lambda path=path: path.unlink())
for port in given["ports"]:
    # A listener of libraries on the loopback can be reached by everybody; what comes there must change nothing.
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.settimeout(0.5)
        for content in (pickle.dumps(Evil()), b"\0" * 64, os.urandom(4096)):
            connection.sendall(len(content).to_bytes(8, "little") + content)
        with suppress(OSError):
            connection.recv(64)
commands = b""
for entry in Path("/proc").iterdir():
    with suppress(OSError):  # one that has ended meanwhile, or is no process
        commands += (entry / "cmdline").read_bytes() + b"\0"
for secret in json.loads(sys.stdin.read()):  # what the test knows, and this user does not: to look for it
    if secret.encode() in commands:
        print(f"saw {secret} in the process list")
