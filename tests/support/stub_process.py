"""The stub engine as a process: `python -m tests.support.stub_process SOCKET SECONDS`. Ends with standard input."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


async def main(path: Path, seconds: float) -> None:
    from tests.support.serving import StubApp, listening

    async with listening(StubApp(seconds), path):
        await asyncio.Event().wait()


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2])))
