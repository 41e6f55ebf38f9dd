"""Whether `dstune[serve]` is installed."""

from __future__ import annotations

import importlib.util

from dstune.core.errors import Problem, UserError

MODULES = ("alembic", "httpx2", "limits", "prometheus_client", "sqlalchemy", "uvicorn")


def require() -> None:
    """Raises UserError that names what is missing."""
    absent = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if absent:
        reason = f"needs the extra `serve`; {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing"
        raise UserError(Problem("dstune serve", reason, "pip install 'dstune[serve]'"))
