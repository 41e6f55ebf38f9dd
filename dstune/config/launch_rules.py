"""Rules of `launch`: what every launcher's keys may say; the rest are the launcher's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import launcher_of


def check_launch(config: RunConfig) -> Iterator[Problem]:
    launch = config.launch
    for name in launch.export_env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # A value would be on every rank's command line; the name is enough, and no secret is repeated here.
            fix = (
                "name the variable only; its value is that of this process" if "=" in name else "letters, digits and _"
            )
            yield Problem("launch.export_env", "this is no name of an environment variable", fix, name.split("=")[0])
    yield from _check_characters(config)
    yield from launcher_of(launch).check()


CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def _check_characters(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each character that breaks scripts, option lines and other machines' shells: a line break would begin
    a line of its own there."""
    values: list[tuple[str, str]] = [("run.dir", config.run.dir or ""), ("run.name", config.run.name)]
    for field in fields(config.launch):
        value = getattr(config.launch, field.name)
        texts = value if isinstance(value, list) else [value]
        values += [(f"launch.{field.name}", text) for text in texts if isinstance(text, str)]
    for key, text in values:
        if CONTROL.search(text):
            yield Problem(key, "it has a line break or another control character in it", "leave that out", text)
        elif key == "launch.interface":  # in the option lines of every launcher that has it
            yield from quote_problems(key, text)


def quote_problems(key: str, text: str) -> Iterator[Problem]:
    """Yield what is wrong with a value that stands between quotes in a line of options."""
    if re.search(r"[\"'`\\]", text):
        yield Problem(key, "it has a quote or a backslash in it", "leave that out", text)
