"""Libraries that only some settings need: imported when they are, or a message that says what to install."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from dstune.errors import Problem, UserError


@cache
def require(module: str, key: str, value: str) -> Any:
    """The imported `module`. Raises UserError, naming the setting `key=value` that needs it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            Problem(
                where=key,
                value=value,
                reason=f"this needs the package {package}, which is not installed",
                fix="pip install 'dstune[clean]'",
            )
        ) from None
