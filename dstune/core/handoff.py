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

from dstune.core import files
from dstune.core.errors import Problem, UserError

HANDOFF_FILE = "DSTUNE_HANDED"
"""The name of the file, set where something is handed over."""
FOLDER = "DSTUNE_FOLDER"
"""Where relative paths of the configuration begin; launchers of several nodes start ranks elsewhere."""
RANK_LOGS = "DSTUNE_RANK_LOGS"
"""Set for ranks that write their own logs, since what started them mixes the output of all."""


def handoff_file(name: str) -> Path:
    """Return where a node keeps what is handed over. name: random, so that nobody can take the place before."""
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return folder / f"dstune-{os.getuid()}-{name}.json"


def set_up_rank(rank: int, run_dir: Path, variables: MutableMapping[str, str]) -> None:
    """Set up a rank that a launcher of several nodes started, before anything else: its folder, its log, what was handed over."""
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
    """Add what was handed over: `all` for every rank, `first` for rank 0, which alone talks to trackers.

    Raises:
        UserError: the file is not there, or not one that this user alone can have written: `PATH` is among what it sets.
    """
    name = variables.get(HANDOFF_FILE)
    if not name:
        return
    file = handoff_file(name)
    try:
        handoff = json.loads(files.read_own(file))
    except (OSError, ValueError) as error:
        reason = f"what the launching process handed over cannot be taken: {error}"
        raise UserError(Problem(str(file), reason, "start the run again; look at who owns the file")) from None
    variables.update(handoff.get("all", {}))
    if rank == 0:
        variables.update(handoff.get("first", {}))
