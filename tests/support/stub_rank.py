"""A rank that trains nothing: `python -m tests.support.stub_rank RUN_DIR`. Files in the run directory tell it what to do:
`die-RANK` (once), `finish`; it leaves `place-RANK` with its number of ranks and its generation."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dstune.core.errors import EXIT_PREEMPTED
from dstune.core.lease import LEASE
from dstune.core.rank_env import die_with_parent


def main(run_dir: Path) -> int:
    die_with_parent()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = run_dir / f"place-{rank}"
    place.with_suffix(".new").write_text(json.dumps([size, int(Path(os.environ[LEASE]).name), os.getpid()]))
    place.with_suffix(".new").rename(place)
    while True:
        if (run_dir / f"die-{rank}").exists():
            (run_dir / f"die-{rank}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (run_dir / "finish").exists():
            if rank == 0:
                (run_dir / "result.json").write_text(json.dumps({"status": "completed", "steps": 3}))
            return 0
        if stopped:
            if rank == 0:
                (run_dir / "result.json").write_text(json.dumps({"status": "preempted", "reason": "asked", "steps": 2}))
            return EXIT_PREEMPTED
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
