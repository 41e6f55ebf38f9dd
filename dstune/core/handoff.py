"""Hands secrets of the launching process's environment to ranks on other nodes, without showing them on a command line.

The launch puts them into a file in each node's memory that only the user can read (`dstune/launch/node.py`).
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

from dstune.core import files
from dstune.core.errors import Problem, UserError

HANDOFF_FILE = "DSTUNE_HANDED"
"""Environment variable with the name of the file; set only if something is handed over."""
FOLDER = "DSTUNE_FOLDER"
"""Environment variable with the folder that relative paths of the configuration refer to: launchers of several nodes start ranks in
another one."""
RANK_LOGS = "DSTUNE_RANK_LOGS"
"""Environment variable that makes ranks write their own logs; set if the launcher mixes the output of all ranks."""


def handoff_file(name: str) -> Path:
    """Return the path of the handed-over file on a node. name: random, so that nobody can create the file first."""
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return folder / f"dstune-{os.getuid()}-{name}.json"


def set_up_rank(rank: int, run_dir: Path, variables: MutableMapping[str, str]) -> None:
    """Set up a rank that a launcher of several nodes started: its folder, its log, its environment. Call it before all else."""
    if folder := variables.get(FOLDER):
        os.chdir(folder)
    if variables.get(RANK_LOGS):
        file = run_dir / "logs" / f"rank-{rank}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        log = files.open_plain(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        os.close(log)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        print(f"=== rank {rank} on {socket.gethostname()}, {started} ===", flush=True)
    take(rank, variables)


def take(rank: int, variables: MutableMapping[str, str]) -> None:
    """Add the handed-over variables to `variables`: `all` on every rank, `first` on rank 0 alone, which talks to trackers.

    Raises:
        UserError: the file is missing, or somebody other than this user may have written it (it sets variables such as `PATH`).
    """
    name = variables.get(HANDOFF_FILE)
    if not name:
        return
    file = handoff_file(name)
    try:
        handoff = json.loads(files.read_own(file))
    except (OSError, ValueError) as error:
        reason = f"cannot read the environment that the launching process handed over: {error}"
        raise UserError(Problem(str(file), reason, "start the run again; look at who owns the file")) from None
    variables.update(handoff.get("all", {}))
    if rank == 0:
        variables.update(handoff.get("first", {}))
