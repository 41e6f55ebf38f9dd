"""Whether `dstune[serve]` and `dstune[api]` are installed."""

from __future__ import annotations

import importlib.util

from dstune.core.errors import Problem, UserError

MODULES = ("aiohttp", "alembic", "httptools", "limits", "prometheus_client", "sqlalchemy", "uvicorn", "uvloop", "yarl")
API_MODULES = ("cryptography", "python_multipart", "rapidfuzz")


def require() -> None:
    """Raises UserError that names what is missing."""
    _require("serve", MODULES)


def require_api() -> None:
    """The same for the fine-tuning API."""
    _require("api", API_MODULES)


def _absent(modules: tuple[str, ...]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _require(extra: str, modules: tuple[str, ...]) -> None:
    if absent := _absent(modules):
        reason = f"needs the extra `{extra}`; {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing"
        raise UserError(Problem("dstune serve", reason, f"pip install 'dstune[{extra}]'"))
