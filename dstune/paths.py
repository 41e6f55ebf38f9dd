"""Where dstune keeps what can be made again: fetched samples and tokenized data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache folder (not created here): `$DSTUNE_CACHE`, else `$XDG_CACHE_HOME/dstune`, else `~/.cache/dstune`."""
    if explicit := os.environ.get("DSTUNE_CACHE"):
        return Path(explicit).expanduser().absolute()
    if user_cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(user_cache).expanduser().absolute() / "dstune"
    return Path.home() / ".cache" / "dstune"
