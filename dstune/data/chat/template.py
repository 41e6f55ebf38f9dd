"""A chat template as transformers renders it, with the arguments and the date of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from dstune.data.chat.rule import Span
from dstune.data.template_date import freeze_date

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)

_compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
"""What transformers compiles templates with, where this version has it under that name."""

UNSEEN = frozenset({"weight"})
"""Keys of a message that are for the loss and that no template gets to see."""


class RenderError(ValueError):
    """This conversation cannot be rendered, or its targets cannot be found; the text says why."""


class ChatTemplate:
    """The template of a tokenizer (of transformers); picklable.

    date: what the template takes for today. arguments: of the run, given to the template with every conversation.
    """

    def __init__(self, tokenizer: Any, date: str | None, arguments: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.date = date
        self._sources: dict[bool, str] = {}

    def source(self, tools: Tools | None) -> str:
        """The Jinja text; a tokenizer may have one of its own for conversations with tools."""
        has_tools = bool(tools)
        if has_tools not in self._sources:
            self._sources[has_tools] = freeze_date(self.tokenizer.get_chat_template(tools=tools or None), self.date)
        return self._sources[has_tools]

    def has_marks(self, tools: Tools | None) -> bool:
        """Whether the template says itself what is trained (`{% generation %}`)."""
        return bool(_GENERATION_TAG.search(self.source(tools)))

    def text(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """The rendered conversation, with the generation prompt behind it if `prompt`. Raises RenderError.

        arguments: beside those of the run, which they replace.
        """
        try:
            rendered = self.tokenizer.apply_chat_template(
                seen(messages),
                tools=tools or None,
                chat_template=self.source(tools),
                add_generation_prompt=prompt,
                tokenize=False,
                **(self.arguments | dict(arguments or {})),
            )
        except _ERRORS as error:
            raise RenderError(f"the chat template refuses this conversation: {_first_line(error)}") from None
        return str(rendered)

    def direct(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """As `text`, but without copying and checking the messages: 3 times as fast, and equal for rows of plain JSON.

        A conversation of ten exchanges is rendered 20 times; `agrees` compares the two once for each row.
        """
        if _compiled is None:
            return self.text(messages, tools=tools, arguments=arguments, prompt=prompt)
        given = self.tokenizer.special_tokens_map | self.arguments | dict(arguments or {})
        try:
            template = _compiled(self.source(tools))
            rendered = template.render(
                messages=seen(messages), tools=tools or None, documents=None, add_generation_prompt=prompt, **given
            )
        except _ERRORS as error:
            raise RenderError(f"the chat template refuses this conversation: {_first_line(error)}") from None
        return str(rendered)

    def agrees(self, messages: Messages, *, tools: Tools | None, arguments: Mapping[str, Any] | None) -> bool:
        """Whether `direct` renders a conversation as transformers does. Raises RenderError as `text` does."""
        expected = self.text(messages, tools=tools, arguments=arguments)
        try:
            return self.direct(messages, tools=tools, arguments=arguments) == expected
        except RenderError:
            return False

    def marks(
        self, messages: Messages, *, tools: Tools | None = None, arguments: Mapping[str, Any] | None = None
    ) -> list[Span]:
        """What the template marks with `{% generation %}`: characters of `text`. Raises RenderError."""
        given = {**self.tokenizer.special_tokens_map, **self.arguments, **dict(arguments or {})}
        try:
            _, indices = render_jinja_template(
                conversations=[seen(messages)],
                tools=tools or None,
                chat_template=self.source(tools),
                return_assistant_tokens_mask=True,
                **given,
            )
        except _ERRORS as error:
            raise RenderError(f"the chat template refuses this conversation: {_first_line(error)}") from None
        return sorted((start, end) for start, end in indices[0])


def seen(messages: Messages) -> Messages:
    """What a template gets to see of `messages`."""
    return [{key: value for key, value in message.items() if key not in UNSEEN} for message in messages]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """`template` that renders as with `arguments` where it gets none of their names."""
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in sorted(arguments.items())
    ]
    # trim_blocks removes exactly the line break after each block.
    return "".join([*lines, template])


def _literal(value: Any) -> str:
    """A value of JSON as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
