"""Import the libraries that only some settings of `data.clean` need, or say what to install."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from dstune.config.convert import format_value
from dstune.config.data_schema import CleanConfig, Duplicates, Found
from dstune.core.errors import Problem, UserError

PACKAGES = {
    "languages": {"py3langid": "py3langid"},
    "duplicates": {"rensa": "rensa", "rapidfuzz": "rapidfuzz"},
    "secrets": {"detect_secrets": "detect-secrets"},
    "personal_data": {"phonenumbers": "phonenumbers", "stdnum": "python-stdnum"},
}
"""By key of `data.clean`: the modules that it may need, and the distribution that provides each."""


def _needed(config: CleanConfig) -> dict[str, dict[str, str]]:
    is_used_by_key = {
        "languages": bool(config.languages),
        "duplicates": config.duplicates is Duplicates.near,
        "secrets": config.secrets is not Found.keep,
        "personal_data": config.personal_data is not Found.keep,
    }
    return {key: PACKAGES[key] for key, is_used in is_used_by_key.items() if is_used}


def missing(config: CleanConfig) -> Iterator[Problem]:
    """Yield a problem for each module that `config` needs and that is not installed; imports none of them."""
    for key, packages in _needed(config).items():
        for module in packages:
            if find_spec(module) is None:
                yield _problem(module, f"data.clean.{key}", format_value(getattr(config, key)))


def versions(config: CleanConfig) -> dict[str, str]:
    """Return the versions of the packages that determine what cleaning with `config` does."""
    return {name: _version(name) for packages in _needed(config).values() for name in packages.values()}


@cache
def require(module: str, key: str) -> Any:
    """Return the imported `module`. If it is missing, raises UserError that names the setting `key` that needs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(_problem(module.partition(".")[0], key, "")) from None


def _problem(module: str, key: str, value: str) -> Problem:
    name = next(packages[module] for packages in PACKAGES.values() if module in packages)
    return Problem(key, f"the package {name} is not installed", "pip install '.[clean]' in a clone of dstune", value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # `missing` and `require` report it
        return ""
