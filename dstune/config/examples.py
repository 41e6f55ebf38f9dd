"""Completes the settings that messages and help pages advise with everything that they need to be accepted."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from dstune.config.convert import DEFAULT, example_value, format_value, has_default, typed
from dstune.config.fields import NEEDS
from dstune.config.names import all_keys, choices_with, default_of, field_of
from dstune.config.schema import CHOICES

NEEDS_OF_FILES = {"zero=file": "zero.path=ds_config.json"}
"""Like `needs` of a class, for choices that are a file in `conf` but no class."""


def complete(*settings: str) -> str:
    """Return settings as a user types them, with the choice that has each key, and what choices and keys need.

    `method.layers=2` becomes `method=head task=classification method.layers=2`. settings: KEY=VALUE or GROUP=CHOICE, without the
    quotes of a shell.
    """
    values: dict[str, str] = {}
    for setting in settings:
        _add(setting, values, set())
    return " ".join(typed(key, value) for key, value in values.items())


def complete_example(key: str) -> str:
    """Return an example that sets `key` to a valid value, with everything that it needs."""
    settings = complete(f"{key}={example_value(key)}")
    return f"{settings}{DEFAULT}" if has_default(key) and " " not in settings else f"for example {settings}"


def needs_of(choice: str) -> list[str]:
    """Return the settings without which a choice (`method=freeze`) is refused."""
    group, _, name = choice.partition("=")
    cls = CHOICES.find(group, name) if group in CHOICES else None
    return shlex.split(getattr(cls, "needs", NEEDS_OF_FILES.get(choice, "")))


def _add(setting: str, values: dict[str, str], pending: set[str]) -> None:
    """Add a setting to `values`, a choice before and a key after what it needs. pending: keys that will be added after this one.

    `needs` of a key names all that the key needs; what these settings need otherwise is not added.
    """
    key, _, value = setting.partition("=")
    if "." not in key:
        values[key] = value
    for needed in _needed(key, value):
        name, _, needed_value = needed.partition("=")
        if name in {*values, *pending}:
            continue
        if "." in name:
            values[name] = needed_value
        else:
            _add(needed, values, pending | {key})
    values[key] = value


def _needed(key: str, value: str) -> Iterator[str]:
    section = key.partition(".")[0]
    if section == key:
        yield from needs_of(f"{key}={value}")
    elif field := field_of(key) if key in all_keys() else None:
        choices = choices_with(key)
        if len(choices) < len(CHOICES.get(section, {})):
            yield choices[0]
        if value != format_value(default_of(key)):
            yield from shlex.split(field.metadata.get(NEEDS, ""))
