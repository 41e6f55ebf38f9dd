"""Ids of objects, and timestamps of the API."""

from __future__ import annotations

import secrets
import string
import time

_LETTERS = string.ascii_letters + string.digits


def new_id(prefix: str, length: int = 24) -> str:
    """Return an id: `prefix`, such as `file-`, and `length` random letters and digits."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def unix_time() -> int:
    """Return the Unix time in whole seconds."""
    return int(time.time())
