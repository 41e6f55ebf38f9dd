"""The folder in which a server keeps its database, keys and logs: of this user alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.core.errors import Problem, UserError

if TYPE_CHECKING:
    from dstune.serve.store.database import Database

STATE = "serving"


def state_folder(path: Path, *, create: bool) -> Path:
    """Raises UserError where it is a link, or another user may read it."""
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        found = os.lstat(path)
    except OSError:
        raise UserError(
            Problem("--state", "there is no such folder", "start `dstune serve` first", str(path))
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(Problem("--state", "is not a folder of this user", "give another one", str(path)))
    if found.st_mode & 0o077:
        raise UserError(Problem("--state", "other users may enter it", f"chmod 700 {path}", str(path)))
    return path.resolve()


def opened_database(state: Path, url: str | None, *, create: bool) -> Database:
    """The database at `url`, or the one in the server's folder. Raises UserError."""
    from dstune.serve.store.database import DATABASE, Database

    if url:
        return Database(url)
    folder = state_folder(state, create=create)
    if not create and not (folder / DATABASE).is_file():
        raise UserError(Problem("--state", "no server has run here yet", "dstune serve-keys add NAME", str(state)))
    return Database.of_folder(folder)
