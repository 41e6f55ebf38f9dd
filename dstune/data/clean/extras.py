"""Libraries that only some settings need: imported when they are, or a message that says what to install."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dstune.config.data_schema import CleanConfig, Duplicates, Found
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


def versions(config: CleanConfig) -> dict[str, str]:
    """Versions of the packages that decide what cleaning under `config` does."""
    wanted = {
        "py3langid": bool(config.languages),
        "rensa": config.duplicates is Duplicates.near,
        "rapidfuzz": config.duplicates is Duplicates.near,
        "detect-secrets": config.secrets is not Found.keep,
        "phonenumbers": config.personal_data is not Found.keep,
        "python-stdnum": config.personal_data is not Found.keep,
    }
    return {name: _version(name) for name, needed in wanted.items() if needed}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # said where it is needed
        return ""
