"""The cache folder, and names of files that several layers use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROJECT_FILE = "dstune.yaml"
"""File in the working directory of a command: the plugins of its project."""
RUN_FILE = "run.yaml"
BEGUN = "environment.json"
"""File that the ranks write just before training begins, when all checks have passed."""
CERTIFICATE_FILE = "certificate.json"
"""File of a run with the newest certificate of `dstune verify` when the run started."""
REFERENCE_FILE = "reference.json"
"""File of an export with the answers of the model as trained, with which servers are compared."""
STOP_FILE, SAVE_FILE = "STOP", "SAVE"
"""Names of files in the run directory that ask for a save, with and without stopping."""
PRUNE_FILE = "PRUNE"
"""File in the run directory of a sweep's trial that ends it without a save; it holds the reason."""
SIGNAL_FILE = "signal"
"""File in `logs/` while a launch ends: the name of the signal that its process received and forwards as SIGTERM."""
STOP_REASON = f"a file named {STOP_FILE} asked for it"
"""Reason of a run that was stopped by this file, which must not be continued automatically."""


def cache_root() -> Path:
    """Return the cache folder: `$DSTUNE_CACHE`, else `$XDG_CACHE_HOME/dstune`, else `~/.cache/dstune`.

    The latter two are made here, for this user alone, as the XDG Base Directory Specification has it: the cache has copies of rows
    that may be private. A folder of DSTUNE_CACHE may be a team's; it is not created here.
    """
    if explicit := os.environ.get("DSTUNE_CACHE"):
        return Path(explicit).expanduser().absolute()
    user_cache = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(user_cache).expanduser().absolute() if user_cache else Path.home() / ".cache") / "dstune"
    with suppress(OSError):  # whoever writes into it reports that
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def certificates_folder() -> Path:
    """Return the folder of the certificates that `dstune verify` writes."""
    return cache_root() / "certificates"
