"""Join named chat templates: some models have a separate one for conversations with tools (Hermes, Command R)."""

from __future__ import annotations

from collections.abc import Mapping

DEFAULT, TOOL_USE = "default", "tool_use"


def joined(templates: Mapping[str, str]) -> str:
    """Return one template that renders as transformers does with `templates`: `tool_use` if a conversation has tools, otherwise
    the default."""
    default = templates.get(
        DEFAULT, "{{ raise_exception('this model has a chat template for conversations with tools alone') }}"
    )
    if TOOL_USE not in templates:
        return default
    return f"{{%- if tools %}}{_within(templates[TOOL_USE])}{{%- else %}}{_within(default)}{{%- endif %}}"


def _within(template: str) -> str:
    """Return `template` so that it can stand between two blocks. The empty expressions protect white space that blocks would
    remove; one line break at the end goes, as Jinja removes it from the end of any template."""
    return f"{{{{ '' }}}}{template.removesuffix(chr(10))}{{{{ '' }}}}"
