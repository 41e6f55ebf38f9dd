"""A node's helper for a launch from another machine: `python -m dstune.launch.node LAUNCH_ID`, over an ssh that stays open.

It stores the secrets that the ranks of this node need, which no command line may show. When the connection ends, for whatever
reason, it ends every process of the launch on this node.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys

from dstune.core.handoff import handoff_file
from dstune.launch.processes import end_all


def main(launch_id: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    handoff = json.loads(sys.stdin.readline() or "{}")
    file = handoff_file(handoff.get("file", {}).get("name", ""))
    try:
        if handoff:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(file, flags, 0o600), "w") as stream:
                json.dump(handoff, stream)
        print("ready", flush=True)
        for _ in sys.stdin:
            pass
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        end_all(launch_id, polite_seconds=1.0, patience=30.0)


if __name__ == "__main__":
    main(sys.argv[1])
