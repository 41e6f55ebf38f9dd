"""A rank that does what it is told instead of training: `python -m support.spark_rank HOW RUN_DIR`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dstune.core.errors import Preempted, Problem, TrainingFailed, UserError
from dstune.core.rank_errors import leave_error


def main(how: str, folder: str) -> None:
    run_dir, rank = Path(folder), int(os.environ["RANK"])
    (run_dir / f"seen-{rank}.json").write_text(json.dumps(dict(os.environ)))
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}", flush=True)

    def end(status: str, code: int, error: Exception | None = None) -> None:
        if rank == 0:
            (run_dir / "result.json").write_text(json.dumps({"status": status, "reason": how, "steps": 3}))
        if error is not None:
            leave_error(run_dir, rank, error)
        sys.exit(code)

    match how:
        case "completes":
            end("completed", 0)
        case "preempted":
            end("preempted", 75, Preempted("received SIGUSR1: saved at step 3"))
        case "mistaken":
            if rank == 1:
                leave_error(run_dir, rank, UserError(Problem("data.train", "is wrong", "mend it")))
                sys.exit(2)
        case "fails":
            if rank == 1:
                leave_error(run_dir, rank, TrainingFailed("loss was not finite"))
                sys.exit(1)
        case "fails without a word":
            if rank == 1:
                sys.exit(3)
        case "killed":
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        case "waits for STOP":
            while not (run_dir / "STOP").exists():
                time.sleep(0.1)
            end("preempted", 75)
    time.sleep(600)  # until the launch ends it


if __name__ == "__main__":
    main(*sys.argv[1:])
