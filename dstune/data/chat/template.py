"""A chat template as transformers renders it, with the arguments and the date of a run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from dstune.core.errors import Problem, UserError, first_line
from dstune.core.limits import TooMuch, limited, trial
from dstune.data.chat.content_format import as_template_reads
from dstune.data.chat.rule import Span
from dstune.data.chat.thoughts import inlined
from dstune.data.template_date import freeze_date

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
RENDER_SECONDS = 1.5
"""Processor time for a conversation: one of 1,000 messages takes some 50 ms."""
TRIAL_SECONDS = 1.0
"""For the conversations of `_TRIED` together, which take some 100 ms."""
OPENING_SECONDS = 0.8
"""For all that show how the template writes, some 35 short ones, which take some 30 ms."""
MAX_SLOW_ROWS = 10
"""So many conversations may take too long and be bad rows; then the template is refused."""

_compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
"""What transformers compiles templates with, where this version has it under that name."""

UNSEEN = frozenset({"weight"})
"""Keys of a message that are for the loss and that no template gets to see."""


_USER, _ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_TRIED: list[tuple[Messages, bool]] = [
    ([_USER], True),
    ([_USER, _ASSISTANT], False),
    ([{"role": "system", "content": "c"}, _USER, _ASSISTANT, _USER, _ASSISTANT, _USER], True),
]


class RenderError(ValueError):
    """This conversation cannot be rendered, or its targets cannot be found; the text says why."""


class TemplateRefusal(RenderError):
    """The template raised an error of its own for this conversation."""


class ChatTemplate:
    """The template of a tokenizer (of transformers); picklable.

    date: what the template takes for today. arguments: of the run, given to the template with every conversation.
    text: another template than the tokenizer's.
    """

    def __init__(
        self, tokenizer: Any, date: str | None, arguments: Mapping[str, Any] | None = None, text: str | None = None
    ):
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.date = date
        self._sources = {} if text is None else dict.fromkeys((False, True), freeze_date(text, date))
        self._slow_rows = 0
        self._budget: float | None = None
        """Processor seconds that the conversations of `opening` have left together."""

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Give all conversations within the block `OPENING_SECONDS` together."""
        self._budget = OPENING_SECONDS
        try:
            yield
        finally:
            self._budget = None

    def source(self, tools: Tools | None) -> str:
        """Return the Jinja text; a tokenizer may have one of its own for conversations with tools."""
        has_tools = bool(tools)
        if has_tools not in self._sources:
            source = freeze_date(self.tokenizer.get_chat_template(tools=tools or None), self.date)
            self._try(source)
            self._sources[has_tools] = source
        return self._sources[has_tools]

    def has_marks(self, tools: Tools | None) -> bool:
        """Return whether the template says itself what is trained (`{% generation %}`)."""
        return bool(_GENERATION_TAG.search(self.source(tools)))

    def text(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """Return the rendered conversation, with the generation prompt behind it if `prompt`. Raises RenderError.

        arguments: beside those of the run, which they replace.
        """
        source = self.source(tools)
        with self._as_row_error():
            rendered = self.tokenizer.apply_chat_template(
                seen(messages, source),
                tools=tools or None,
                chat_template=source,
                add_generation_prompt=prompt,
                tokenize=False,
                **(self.arguments | dict(arguments or {})),
            )
        return str(rendered)

    def _try(self, source: str) -> None:
        """Render made-up conversations in a process that can be killed. Raises UserError where it has to be.

        A template is a program: `{{ 10**(10**9) }}` would hold this process, and no signal could end it.
        """

        def render() -> None:
            for messages, prompt in _TRIED:
                try:
                    self.tokenizer.apply_chat_template(
                        messages, chat_template=source, add_generation_prompt=prompt, tokenize=False, **self.arguments
                    )
                except MemoryError:
                    raise
                except Exception:  # it refuses this conversation, which may be what it is for
                    continue

        if reason := trial("to print a conversation of three messages", source, render, TRIAL_SECONDS):
            raise UserError(_untamed(reason))

    @contextmanager
    def _as_row_error(self) -> Iterator[None]:
        """Render within limits. Raises RenderError, whatever the template does."""
        began = time.process_time()
        try:
            # What is left of the opening may be a millisecond, which is no time to end a process after.
            with limited(RENDER_SECONDS if self._budget is None else self._budget, ended_after=5 * RENDER_SECONDS):
                yield
        except TooMuch as error:
            if self._budget is not None:
                raise UserError(_untamed(f"to print a few short conversations {error}")) from None
            self._slow_rows += 1
            if self._slow_rows >= MAX_SLOW_ROWS:
                reason = f"to print each of {MAX_SLOW_ROWS} conversations {error}"
                raise UserError(_untamed(reason)) from None
            raise RenderError(f"to print this conversation the chat template {error}") from None
        except UserError:
            raise
        except Exception as error:  # a template is a program of somebody else: it may raise anything
            raise TemplateRefusal(f"the chat template refuses this conversation: {first_line(error)}") from None
        finally:
            if self._budget is not None:
                self._budget = max(self._budget - (time.process_time() - began), 0.001)

    def direct(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """Render as `text`, but without copying and checking the messages: 3 times as fast, and equal for rows of plain JSON.

        A conversation of ten exchanges is rendered 20 times; `agrees` compares the two once for each row.
        """
        if _compiled is None:
            return self.text(messages, tools=tools, arguments=arguments, prompt=prompt)
        variables = self.tokenizer.special_tokens_map | self.arguments | dict(arguments or {})
        source = self.source(tools)
        with self._as_row_error():
            template = _compiled(source)
            rendered = template.render(
                messages=seen(messages, source),
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
                **variables,
            )
        return str(rendered)

    def agrees(self, messages: Messages, *, tools: Tools | None, arguments: Mapping[str, Any] | None) -> bool:
        """Return whether `direct` renders a conversation as transformers does. Raises RenderError as `text` does."""
        expected = self.text(messages, tools=tools, arguments=arguments)
        try:
            return self.direct(messages, tools=tools, arguments=arguments) == expected
        except RenderError:
            return False

    def marks(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] | None = None,
        prompt: bool = False,
    ) -> list[Span]:
        """Return what the template marks with `{% generation %}`: characters of `text`. Raises RenderError."""
        variables = {**self.tokenizer.special_tokens_map, **self.arguments, **dict(arguments or {})}
        source = self.source(tools)
        with self._as_row_error():
            _, indices = render_jinja_template(
                conversations=[seen(messages, source)],
                tools=tools or None,
                chat_template=source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **variables,
            )
        return sorted((start, end) for start, end in indices[0])


def seen(messages: Messages, source: str) -> Messages:
    """Return what the template `source` gets to see of `messages`."""
    visible = [{key: value for key, value in message.items() if key not in UNSEEN} for message in messages]
    return as_template_reads(visible, source)


def _untamed(reason: str) -> Problem:
    fix = "set model.chat_template to a template that you trust, for example one of those in docs/chat-templates.md"
    return Problem("model.chat_template", f"the chat template is refused: {reason}", fix)


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """Return `template` that renders as with `arguments` where it gets none of their names."""
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in sorted(arguments.items())
    ]
    # trim_blocks removes exactly the line break after each block.
    return "".join([*lines, template])


_INLINING = """\
{%- set inlined = namespace(messages=[]) %}
{%- for message in messages %}
{%- set thought = message.reasoning_content or message.reasoning or message.thinking or '' %}
{%- set calls = message.tool_calls or [] %}
{%- set text = message.content or '' %}
{%- if message.role == 'assistant' and thought is string and thought | trim and text is string and CONDITION %}
{%- set text = BEGINNING + (thought | trim) + END %}
{%- if calls %}
{%- set inlined.messages = inlined.messages + [{'role': 'assistant', 'content': text, 'tool_calls': calls}] %}
{%- else %}
{%- set inlined.messages = inlined.messages + [{'role': 'assistant', 'content': text}] %}
{%- endif %}
{%- else %}
{%- set inlined.messages = inlined.messages + [message] %}
{%- endif %}
{%- endfor %}
{%- set messages = inlined.messages %}
"""
"""Puts reasoning that stands in a field of its own at the beginning of the content, as `thoughts.inlined` does."""


def with_inlined_reasoning(template: str, marks: tuple[str, str], turns: Collection[bool]) -> str:
    """Return `template` that writes reasoning from a field at the beginning of the content, between `marks`.

    turns: of those that call tools (True), of others (False). A client may send reasoning back in a field of its own, where the
    model wrote it into the content; the template knows no such field and would drop it.
    """
    if not turns:
        return template
    beginning, end = inlined("", "\1", marks).split("\1")
    between = inlined("x", "\1", marks).split("\1")[1].removeprefix(end).removesuffix("x")
    written = f"{_literal(end)} + ({_literal(between)} + text if text else '')"
    condition = {frozenset({True}): "calls", frozenset({False}): "not calls"}.get(frozenset(turns), "true")
    lines = _INLINING.replace("CONDITION", condition).replace("BEGINNING", _literal(beginning)).replace("END", written)
    return lines + template


def _literal(value: Any) -> str:
    """Return a value of JSON as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
