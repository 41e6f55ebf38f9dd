"""Refuses passwords that are written out in a configuration: `run.yaml`, the report and the trackers would store them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from dstune.config.convert import EnvironmentText
from dstune.core.errors import Problem
from dstune.core.secrets import is_secret

PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE)
"""Matches an address that contains a password."""
TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,}|glpat-[\w-]{20,}|AKIA[0-9A-Z]{16})\b"
)
"""Matches keys of services that can be recognized by their form."""


def check_secrets(config: Any) -> Iterator[Problem]:
    """Yield a problem for each text of the configuration that holds a password or the key of a service, not a reference to one."""
    for key, name, text in _texts(config, ""):
        if isinstance(text, EnvironmentText):
            continue
        is_written_out = PASSWORD.search(text) or TOKEN.search(text) or (name != key and is_secret(name) and text)
        if is_written_out:
            reason = "a password or key is written out here, and run.yaml, the report and trackers would keep it"
            yield Problem(key, reason, f"export SECRET=..., and '{key}=${{oc.env:SECRET}}'")


def _texts(value: Any, key: str, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, name, text) for all texts in a configuration. The name is that of the entry if the text is in a mapping, else the
    key."""
    if isinstance(value, str):
        yield key, name or key, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _texts(getattr(value, field.name), f"{key}.{field.name}" if key else field.name)
    elif isinstance(value, dict):
        for entry, item in value.items():
            yield from _texts(item, f"{key}.{entry}", str(entry))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, key)
