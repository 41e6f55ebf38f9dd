"""What ranks on another node need of the launching process's environment and no command line may show.

The launch leaves it in a file of the node's memory that its owner alone can read (`dstune/launch/node.py`).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import MutableMapping
from datetime import datetime
from pathlib import Path

LAUNCH_ID = "DSTUNE_LAUNCH_ID"
HANDED = "DSTUNE_HANDED"
"""Set for ranks that have to look for the file."""
FOLDER = "DSTUNE_FOLDER"
"""Where relative paths of the configuration begin; launchers of several nodes start ranks elsewhere."""
RANK_LOGS = "DSTUNE_RANK_LOGS"
"""Set for ranks that write their own logs, since what started them mixes the output of all."""


def handed_file(launch_id: str) -> Path:
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return folder / f"dstune-{os.getuid()}-{launch_id}.json"


def settle(rank: int, run_dir: Path, variables: MutableMapping[str, str]) -> None:
    """First thing in a rank that a launcher of several nodes started: its folder, its log, what was handed over."""
    if folder := variables.get(FOLDER):
        os.chdir(folder)
    if variables.get(RANK_LOGS):
        file = run_dir / "logs" / f"rank-{rank}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        os.close(log)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        print(f"=== rank {rank} on {socket.gethostname()}, {started} ===", flush=True)
    take(rank, variables)


def take(rank: int, variables: MutableMapping[str, str]) -> None:
    """Add what was handed over: `all` for every rank, `first` for rank 0, which alone talks to trackers."""
    if not variables.get(HANDED):
        return
    try:
        handed = json.loads(handed_file(variables[LAUNCH_ID]).read_text())
    except (OSError, ValueError):
        return  # nothing was handed over
    variables.update(handed.get("all", {}))
    if rank == 0:
        variables.update(handed.get("first", {}))
