"""What the end of a run on many nodes asks of the shared file system: logs and errors of its ranks, read by all nodes.

    python -m benchmarks.many_logs [--ranks 8,64,512]

Plants the files of ranks, of which one has failed, with eight ranks a node. Counts what the nodes and the leader read of
them: openings and listings of folders (audit events of Python), and processor seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dstune.core.errors import EXIT_FAILED, TrainingFailed
from dstune.core.rank_errors import leave_error
from dstune.launch import attempt, manage, runs
from dstune.launch.verdict import Ended

LINES = 2_000
RANKS_OF_A_NODE = 8
counts = {"openings": 0, "listings": 0}
folder = Path(tempfile.gettempdir())


def count(event: str, arguments: tuple[Any, ...]) -> None:
    """Count openings and listings below `folder`. An audit hook stays until the process ends."""
    names = {"open": "openings", "os.listdir": "listings", "os.scandir": "listings"}
    if event in names and isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(str(folder)):
        counts[names[event]] += 1


def plant(run_dir: Path, ranks: int) -> None:
    """Write the files of a run whose rank 1 has failed."""
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "run.yaml").write_text("run:\n  name: planted\n")
    rows = ({"step": step, "loss": 2.0} for step in range(1, LINES))
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    log = "".join(f"line {number} of a rank that trains\n" for number in range(LINES))
    for rank in range(ranks):
        attempt.log_path(run_dir, rank).write_text(log)
    leave_error(run_dir, 1, TrainingFailed("planted"))


def measured(work: Callable[[], Any]) -> str:
    for name in counts:
        counts[name] = 0
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    seconds = time.process_time() - began
    return f"{counts['openings']:,} | {counts['listings']:,} | {seconds:.3f} |"


def read_on_all_nodes(run_dir: Path, ranks: int) -> None:
    """Read the errors as each node does: once when a rank has died, and once when all have ended (`Launch`)."""
    for _ in range(ranks // RANKS_OF_A_NODE):
        attempt.read_errors(run_dir, ranks)
        attempt.read_errors(run_dir, ranks)


def last_lines(run_dir: Path, rank: int) -> list[str]:
    return attempt.last_lines(attempt.log_path(run_dir, rank))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8,64,512", help="numbers of ranks [%(default)s]")
    options = parser.parse_args()
    global folder
    folder = Path(tempfile.mkdtemp(prefix="many-logs-"))
    sys.addaudithook(count)
    print("| ranks | what | openings | listings | processor s |\n| ---: | --- | ---: | ---: | ---: |")
    try:
        for ranks in map(int, options.ranks.split(",")):
            run_dir = folder / str(ranks)
            plant(run_dir, ranks)
            ended = [Ended(rank, EXIT_FAILED, rank) for rank in range(ranks)]
            works: dict[str, Callable[[], Any]] = {
                "errors, read by all nodes": partial(read_on_all_nodes, run_dir, ranks),
                "which ranks lost their peer, by the leader": partial(
                    attempt.disconnected, ended, partial(last_lines, run_dir)
                ),
                "which ranks waited, by the leader": partial(attempt.stalled, run_dir, ranks, {}),
                "`dstune status`": partial(manage.status, [str(run_dir)]),
                "`dstune runs`": partial(runs.main, [str(run_dir)]),
            }
            for what, work in works.items():
                print(f"| {ranks} | {what} | {measured(work)}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
