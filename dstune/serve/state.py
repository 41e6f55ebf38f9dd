"""The folder in which a server keeps its database, keys and logs, accessible to this user only."""

from __future__ import annotations

import json
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from dstune.core import files, signing
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in

if TYPE_CHECKING:
    from dstune.serve.store.database import Database

STATE = "serving"
"""The folder, in the working directory, that is used without `--state`."""
MARK = "made-by.json"
"""Signature of the user who started the first server here."""


def state_folder(requested: Path | None, *, create: bool) -> Path:
    """Return the folder that `--state` names, by default `STATE`. The default folder must have been created by this user's server:
    a folder from somebody else may contain a database with keys that they know. Naming it once with `--state` accepts it. Raises
    UserError if it is a link, another user can read it, or it came from somebody else."""
    path = requested or Path(STATE)
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        status = os.lstat(path)
    except OSError:
        raise UserError(
            Problem("--state", "there is no such folder", "start `dstune serve` first", str(path))
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(Problem("--state", "is not a folder of this user", "give another one", str(path)))
    if status.st_mode & 0o077:
        raise UserError(Problem("--state", "other users may enter it", f"chmod 700 {path}", str(path)))
    if not _is_signed(path):
        if requested is None and any(path.iterdir()):
            reason = "no server of yours made this folder: whoever did may know the keys of its database"
            raise UserError(
                Problem("--state", reason, f"--state ./{path} if it is yours, else another folder", str(path))
            )
        if create:
            _sign(path)
    return path.resolve()


def _is_signed(path: Path) -> bool:
    mark = object_in(path / MARK)
    signed, signer, _ = signing.signed_by(mark.get("signature"))
    return bool(signer) and signed == {"state": str(mark.get("state"))}


def _sign(path: Path) -> None:
    """Sign the folder as this user's; without a signing key, each command has to name it."""
    state = secrets.token_hex(16)
    signature = signing.sign({"state": state})
    if signature is not None:
        files.write(path / MARK, json.dumps({"state": state, "signature": signature}), mode=0o600)


def open_database(state: Path | None, url: str | None, *, create: bool) -> Database:
    """Return the database at `url`, or by default the one in the server's folder. Raises UserError."""
    from dstune.serve.store.database import DATABASE, Database

    if url:
        return Database(url)
    folder = state_folder(state, create=create)
    if not create and not (folder / DATABASE).is_file():
        raise UserError(Problem("--state", "no server has run here yet", "dstune serve-keys add NAME", str(folder)))
    return Database.open_folder(folder)
