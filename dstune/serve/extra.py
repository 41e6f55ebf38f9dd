"""Checks that `dstune[serve]` and the extras that build on it are installed."""

from __future__ import annotations

import importlib.util

from dstune.core.errors import Problem, UserError

MODULES = (
    "aiohttp",
    "alembic",
    "httptools",
    "limits",
    "prometheus_client",
    "pydantic",
    "sqlalchemy",
    "starlette",
    "uvicorn",
    "uvloop",
    "yarl",
)


def require() -> None:
    """Raises UserError that names the missing modules."""
    require_modules("serve", MODULES)


def _absent(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def require_modules(extra: str, modules: tuple[str, ...]) -> None:
    """Raises UserError that names the missing modules of an extra."""
    if absent := _absent(modules):
        reason = f"needs the extra `{extra}`; {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing"
        raise UserError(Problem("dstune serve", reason, f"pip install '.[{extra}]' in a clone of dstune"))
