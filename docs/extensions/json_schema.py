"""The directive `json-schema`: a JSON schema as a table of its keys, with the file to download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList


def cell_of(definition: dict[str, Any]) -> tuple[str, str]:
    """Type and description of a key in Markdown."""
    kinds = definition.get("type", "any")
    kind = " or ".join(kinds) if isinstance(kinds, list) else kinds
    values = definition.get("enum", [])
    listed = f" One of {', '.join(f'`{value}`' for value in values)}." if values else ""
    return kind, f"{definition.get('description', '')}{listed}"


def table_of(schema: dict[str, Any]) -> str:
    """The keys of `schema` as a Markdown table."""
    lines = ["| key | type | always | meaning |", "| --- | --- | --- | --- |"]
    for name, definition in schema["properties"].items():
        kind, meaning = cell_of(definition)
        always = "yes" if name in schema.get("required", ()) else ""
        lines.append(f"| `{name}` | {kind} | {always} | {meaning} |")
    return "\n".join(lines)


class JsonSchema(Directive):
    """The argument is the schema's file, relative to the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        environment = self.state.document.settings.env
        relative, absolute = environment.relfn2path(self.arguments[0])
        environment.note_dependency(relative)
        schema = json.loads(Path(absolute).read_text(encoding="utf-8"))
        text = f"{schema['description']}\n\n{table_of(schema)}\n\n{{download}}`JSON schema <{self.arguments[0]}>`\n"
        holder = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), self.arguments[0]), 0, holder)
        return holder.children


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("json-schema", JsonSchema)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
