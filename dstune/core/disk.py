"""Recognizes errors of a full disk. Imports nothing of dstune, since reporting errors depends on it."""

from __future__ import annotations

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` says that a disk or a quota is full. Libraries in Rust and C++ put the system's error in a text."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(os.strerror(number) in str(error) for number in FULL)


def fix_of_unwritable_folder(error: OSError) -> str:
    """Return what the user can do about a folder that could not be created or written."""
    return (
        "free space, or give a folder on another disk" if is_disk_full(error) else "give a folder that you may write to"
    )
