"""Where dstune keeps what can be made again, and the files that several layers know."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT_FILE = "dstune.yaml"
"""In the folder where a command is given: the plugins of its project."""
RUN_FILE = "run.yaml"
BEGUN = "environment.json"
"""What the ranks write when nothing keeps the training from beginning any more."""
REFERENCE_FILE = "reference.json"
"""In an export: what the model as it was trained answers, for servers to be compared with."""
STOP_FILE, SAVE_FILE = "STOP", "SAVE"
"""Names of files in the run directory that ask for a save, with and without stopping."""
PRUNE_FILE = "PRUNE"
"""File in the run directory of a sweep's trial that ends it without a save; it holds the reason."""
SIGNAL_FILE = "signal"
"""In `logs/` while a launch ends: the name of the signal that its process received and hands on as SIGTERM."""
STOP_REASON = f"a file named {STOP_FILE} asked for it"
"""What a run that was asked so says about its end; it shall not be continued by itself."""


def cache_root() -> Path:
    """Return the cache folder (not created here): `$DSTUNE_CACHE`, else `$XDG_CACHE_HOME/dstune`, else `~/.cache/dstune`."""
    if explicit := os.environ.get("DSTUNE_CACHE"):
        return Path(explicit).expanduser().absolute()
    if user_cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(user_cache).expanduser().absolute() / "dstune"
    return Path.home() / ".cache" / "dstune"
