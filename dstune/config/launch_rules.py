"""Rules of `launch` that apply to every launcher; each launcher's own are in its room."""

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
            # A value would appear on every rank's command line. The problem repeats only the name, as the value may be a secret.
            fix = (
                "name the variable only; its value is that of this process" if "=" in name else "letters, digits and _"
            )
            yield Problem(
                "launch.export_env", "this is not the name of an environment variable", fix, name.split("=")[0]
            )
    yield from _check_characters(config)
    yield from launcher_of(launch).check()


CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def _check_characters(config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each text with a control character: a line break would start a new line in scripts, option lines and
    the shells of other machines."""
    values: list[tuple[str, str]] = [("run.dir", config.run.dir or ""), ("run.name", config.run.name)]
    for field in fields(config.launch):
        value = getattr(config.launch, field.name)
        texts = value if isinstance(value, list) else [value]
        values += [(f"launch.{field.name}", text) for text in texts if isinstance(text, str)]
    for key, text in values:
        if CONTROL.search(text):
            yield Problem(key, "it contains a line break or another control character", "remove that character", text)
        elif key == "launch.interface":  # in the option lines of every launcher that has it
            yield from quote_problems(key, text)


def quote_problems(key: str, text: str) -> Iterator[Problem]:
    """Yield a problem with a text that will be put between quotes in a line of options."""
    if re.search(r"[\"'`\\]", text):
        yield Problem(key, "it contains a quote or a backslash", "remove that character", text)
