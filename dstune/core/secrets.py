"""Replaces values from the environment by references in everything that dstune writes.

`run.yaml` holds `${oc.env:KEY}` instead of the value, and so does everything else: what a rank prints, error messages,
files of the run directory, what trackers get. Each process remembers the values that it resolved, and those of the
variables that hold a key by their name; `redact` puts the reference in their place in a text, and `redacted` in all
texts of what is about to be written as JSON.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dstune.core.disk import is_disk_full
from dstune.core.text import Filtered, visible_but_colours

MIN_CHARACTERS = 6
"""A shorter value (`auto`, `8`, `cuda`) stays: it is no secret, and replacing it would garble every text."""

REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)[^}]*\}")
SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|(API)?KEY|(PG)?PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIALS)$"
    r"|_(TOKENS|KEYS|PASS|PWD|PAT|SECRETS|CREDS|AUTH|COOKIE|WEBHOOK(_URL)?|CONNECTION_STRING)$"
)
"""Names of variables whose value is a secret wherever it comes from: HF_TOKEN, WANDB_API_KEY, WANDB_PASS, PGPASSWORD,
REGISTRY_AUTH, AZURE_STORAGE_CONNECTION_STRING; not MONKEY, OLDPWD."""
CREDENTIALS = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]+@", re.IGNORECASE)
"""An address with a user name or password, such as that of a proxy."""

_known: dict[str, str] = {}
"""References by the values that they replace."""
_public: set[str] = set()
_references: set[str] = set()


@functools.lru_cache(1024)  # `redact` asks it about every variable for every text
def is_secret(name: str, value: str = "") -> bool:
    """Return whether the environment variable `name` holds a secret: by its name, or because `value` is an address with
    credentials."""
    looks_secret = SECRET_NAME.search(name.upper()) is not None or CREDENTIALS.search(value) is not None
    # NAME:PASSWORD@HOST is enough for a proxy.
    return looks_secret or (name.upper().endswith("_PROXY") and "@" in value)


def remember(value: str, reference: str) -> None:
    """Register a secret: from now on `redact` replaces `value` by `reference`, a text that contains `${oc.env:KEY}`, and the value
    of the variable KEY itself, which may be part of other texts, by `${oc.env:KEY}`."""
    _references.add(reference)
    _add(value, reference)
    for match in REFERENCE.finditer(reference):
        _add(os.environ.get(match[1], ""), f"${{oc.env:{match[1]}}}")


def was_resolved(reference: str) -> bool:
    """Return whether this process has resolved a text with exactly these references already."""
    return reference in _references


def publish(path: str) -> None:
    """Exempt values that are part of `path` from redaction: the run directory's path is on every command line."""
    _public.add(path)


def redact(text: str) -> str:
    """Replace every value in `text` that came from the environment by its reference."""
    for name, value in os.environ.items():
        if is_secret(name, value):
            _add(value, f"${{oc.env:{name}}}")
    for value in sorted(_known, key=len, reverse=True):
        if value in text and not any(value in path for path in _public):
            text = text.replace(value, _known[value])
    return text


def redacted(value: Any) -> Any:
    """Return `value`, which consists of mappings and sequences like JSON, with every text redacted. Numbers and keys stay: files
    must be read back unchanged, and the digits of a count may occur in a password."""
    return texts_mapped(value, redact)


def texts_mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return `value` with `change` applied to each text in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: texts_mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [texts_mapped(item, change) for item in value]
    return value


def _add(value: str, reference: str) -> None:
    if len(value) < MIN_CHARACTERS:
        return
    _known.setdefault(value, reference)
    # Its form in JSON, which escapes quotes, backslashes and characters beyond ASCII.
    _known.setdefault(json.dumps(value)[1:-1], json.dumps(reference)[1:-1])


class RankOutput(Filtered):
    """What a rank prints, often into a log in the run directory: if the disk is full, the text is lost and the rank goes on."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            if not is_disk_full(error):
                raise
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            if not is_disk_full(error):
                raise


def redact_output() -> None:
    """Redact everything that this process prints, by `print`, tracebacks, warnings or logging, and remove control characters for
    the terminal except colours. A full disk refuses no print."""

    def change(text: str) -> str:
        return visible_but_colours(redact(text))

    filtered = {id(stream): RankOutput(stream, change) for stream in (sys.stdout, sys.stderr)}
    sys.stdout, sys.stderr = filtered[id(sys.stdout)], filtered[id(sys.stderr)]
    # Handlers of libraries' loggers refer to the original streams.
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    for logger in loggers:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in filtered:
                handler.setStream(filtered[id(handler.stream)])
