"""Chat templates with names: some models have one for conversations with tools beside their default one (Hermes, Command R)."""

from __future__ import annotations

from collections.abc import Mapping

DEFAULT, TOOL_USE = "default", "tool_use"


def joined(templates: Mapping[str, str]) -> str:
    """Join templates into one that renders as transformers does, which takes the one named `tool_use` where a conversation has
    tools."""
    default = templates.get(
        DEFAULT, "{{ raise_exception('this model has a chat template for conversations with tools alone') }}"
    )
    if TOOL_USE not in templates:
        return default
    return f"{{%- if tools %}}{_within(templates[TOOL_USE])}{{%- else %}}{_within(default)}{{%- endif %}}"


def _within(template: str) -> str:
    """Return `template` between two blocks. An expression keeps the white space that blocks would remove; of the end of a
    template Jinja itself removes one line break."""
    return f"{{{{ '' }}}}{template.removesuffix(chr(10))}{{{{ '' }}}}"
