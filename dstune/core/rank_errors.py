"""How an error of a rank reaches the user, once.

Ranks that dstune started leave it in `logs/rank-N.error` for the process that started them, which tells it. Inside
somebody else's launch all ranks write to the same terminal: what all of them found is told by rank 0 alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from dstune.core import files
from dstune.core.errors import DstuneError, to_json
from dstune.core.rank_env import RankEnv

PATIENCE_SECONDS = 5.0
"""How long a rank waits for the others to come to the same error. One that failed alone waits in vain: the others are
in a collective with it."""
REST_SECONDS = 0.5
"""How long rank 0 waits for the last of the others once the first has looked: launchers end all when one ends."""
POLL_SECONDS = 0.02


def error_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.error"


def leave_error(run_dir: Path, rank: int, error: DstuneError) -> None:
    """Write the rank's error whole or not at all."""
    file = error_file(run_dir, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, to_json(error))


def report_to_launcher(run_dir: Path, rank: int, error: DstuneError) -> None:
    """Report the error of a rank that dstune started to its launcher, and in the rank's log."""
    leave_error(run_dir, rank, error)
    print(f"dstune: {error}", file=sys.stderr, flush=True)


def report_once(
    run_dir: Path, env: RankEnv, error: DstuneError, patience: float = PATIENCE_SECONDS, *, prints: bool = True
) -> None:
    """Print the error of a rank inside somebody else's launch once: rank 0 its own, any other rank only what rank 0 has not
    printed.

    prints: whether rank 0 does; its caller raises the error otherwise.
    A rank leaves its file when it has looked at rank 0's, so rank 0 knows when nobody needs the folder any more.
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
