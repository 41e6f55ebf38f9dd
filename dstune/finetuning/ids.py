"""Ids of objects, and the time as the API tells it."""

from __future__ import annotations

import secrets
import string
import time

_LETTERS = string.ascii_letters + string.digits


def new_id(prefix: str, length: int = 24) -> str:
    """Return `file-` and the like with `length` random letters and digits."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def unix_time() -> int:
    """Return the time in whole seconds, as `created_at`."""
    return int(time.time())
