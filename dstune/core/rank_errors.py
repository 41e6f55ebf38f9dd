"""Reports an error of a rank to the user exactly once.

Ranks that dstune started write it to `logs/rank-N.error`, and the launching process prints it. Inside another program's launch
all ranks write to the same terminal, so an error of all ranks is printed by rank 0 alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dstune.core import files
from dstune.core.disk import is_disk_full
from dstune.core.errors import DstuneError, to_json
from dstune.core.rank_env import STORE, RankEnv

PATIENCE_SECONDS = 5.0
"""How long a rank waits for the others to report the same error. The wait is in vain if it failed alone: the others are still in
a collective with it."""
REST_SECONDS = 0.5
"""How long rank 0 waits for the last rank's report after the first one's: launchers end all ranks when one ends."""
POLL_SECONDS = 0.02


def error_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.error"


def leave_error(run_dir: Path, rank: int, error: DstuneError) -> None:
    """Write the rank's error to its file, atomically. If the disk is full, write it to the launch's folder, if there is one
    (`launch=local`)."""
    file = error_file(run_dir, rank)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write(file, to_json(error))
    except OSError as refusal:
        if not is_disk_full(refusal):
            raise
        if store := os.environ.get(STORE):
            with suppress(OSError):
                files.write(Path(store).with_name(file.name), to_json(error))


def report_to_launcher(run_dir: Path, rank: int, error: DstuneError) -> None:
    """Report the error of a rank that dstune started to its launcher, and in the rank's log."""
    leave_error(run_dir, rank, error)
    print(f"dstune: {error}", file=sys.stderr, flush=True)


def report_once(
    run_dir: Path, env: RankEnv, error: DstuneError, patience: float = PATIENCE_SECONDS, *, prints: bool = True
) -> None:
    """Print the error of a rank inside another program's launch once: rank 0 prints its error, another rank only a different one.

    prints: whether rank 0 prints; otherwise its caller raises the error.
    A rank writes its file after it has read rank 0's, so that rank 0 knows when the folder is no longer needed.
    """
    if env.rank == 0:
        if prints:
            print(f"dstune: {error}", file=sys.stderr, flush=True)
        leave_error(run_dir, 0, error)
        others = [error_file(run_dir, rank) for rank in range(1, env.world_size)]
        if _wait(lambda: not others or any(file.exists() for file in others), patience):
            _wait(lambda: all(file.exists() for file in others), REST_SECONDS)
        return
    _wait(error_file(run_dir, 0).exists, patience)
    try:
        printed = error_file(run_dir, 0).read_text()
    except OSError:
        printed = ""
    if printed != to_json(error):
        print(f"dstune: rank {env.rank}: {error}", file=sys.stderr, flush=True)
    leave_error(run_dir, env.rank, error)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return met
