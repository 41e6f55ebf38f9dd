"""Sections of docstrings (`Args:`, `Returns:`, `Raises:`) as Sphinx writes them.

`sphinx.ext.napoleon` alone would take the words in front of a colon in the documentation of a field for its type.
"""

from __future__ import annotations

from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

FIELDS = ("attribute", "property")


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite the lines of a docstring in place. what: `class`, `function`, `attribute`, ..."""
    if what not in FIELDS:
        config = Config(napoleon_use_rtype=False)
        lines[:] = str(GoogleDocstring(lines, config, app, what, name, obj, options)).splitlines()


def setup(app: Any) -> dict[str, Any]:
    """Listen to docstrings that are read."""
    app.connect("autodoc-process-docstring", on_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
