"""Renders the templates as HTML: everything is escaped, style and script are part of the page, nothing is loaded from outside."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2

from dstune.core import text as core_text
from dstune.report import numbers

PACKAGE = "dstune.report"


@cache
def _environment(package: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in dict.fromkeys((package, PACKAGE))]),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = numbers.number
    environment.filters["percent"] = numbers.percent
    return environment


def render(template: str, *, package: str = PACKAGE, **values: Any) -> str:
    """Return `template` of the folder `templates` with `values`, each escaped where it stands. package: with a folder
    `templates` that is looked at before the report's own, whose parts its templates may use."""
    return _environment(package).get_template(template).render(**values)


def _finalize(value: Any) -> Any:
    """Return what a template prints for `value`: plain text with its control characters visible, anything else as it is."""
    return visible(value) if type(value) is str else value


def visible(text: str) -> str:
    """Return `text` with control characters as pictures (U+2400...), line feeds and tabs as they are: a browser drops some of
    them and HTML forbids others. Characters that turn or hide the text around them are written as their codes: a command would not
    read as it runs."""
    pictures = "".join(
        chr(0x2400 + ord(character)) if ord(character) < 32 and character not in "\n\t" else character
        for character in text.replace("\r\n", "\n").replace("\x7f", "\u2421")
    )
    return core_text.visible(pictures.encode("utf-8", "replace").decode("utf-8"))
