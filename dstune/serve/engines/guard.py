"""Runs a program that must not outlive the gateway: `python -I guard.py PROGRAM ARGUMENTS`, in a process group of its own.

Standard input is a pipe that the gateway holds. When it closes, however the gateway ended, the program gets SIGTERM, and its
whole process group SIGKILL after that. Standard library only: it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 10.0


def main(argv: list[str]) -> int:
    """Run the program and return its exit status; 128 + N if signal N ended it."""
    if os.getpgrp() != os.getpid():
        os.setpgrp()  # what is killed at the end is this group: never that of whoever started it
    try:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{argv[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: child.send_signal(received))
    threading.Thread(target=_end_with_gateway, args=(child,), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _end_with_gateway(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
