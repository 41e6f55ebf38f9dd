"""Render conversations with a chat template as transformers does, within limits of time and memory."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from dstune.core.confinement.here import TooMuch, limited, trial
from dstune.core.confinement.spawned import ProcessEnded
from dstune.core.confinement.table import TEMPLATE, TEMPLATE_OPENING, TEMPLATE_TRIAL
from dstune.core.errors import Problem, UserError, first_line
from dstune.data.chat import rendering
from dstune.data.chat.content_format import as_template_reads
from dstune.data.chat.rule import Span
from dstune.data.chat.thoughts import inlined
from dstune.data.template_date import freeze_date

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MAX_SLOW_ROWS = 10
"""A conversation that takes too long is a bad row; after this many, the template is refused."""

_compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
"""The function with which transformers compiles templates; None if this version has none of that name."""

_LOSS_KEYS = frozenset({"weight"})
"""Keys of a message that only the loss reads; templates never see them."""

_USER, _ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_TRIED: list[tuple[Messages, bool]] = [
    ([_USER], True),
    ([_USER, _ASSISTANT], False),
    ([{"role": "system", "content": "c"}, _USER, _ASSISTANT, _USER, _ASSISTANT, _USER], True),
]


class RenderError(ValueError):
    """This conversation cannot be rendered, or its targets cannot be found; the text says why."""


class TemplateRefusal(RenderError):
    """The template itself raised an error for this conversation."""


class ChatTemplate:
    """The chat template of a transformers tokenizer; picklable.

    date: the day that the template uses as today. arguments: the run's, passed to the template with every conversation.
    text: a template to use instead of the tokenizer's.
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
        """Processor seconds that remain for the conversations within `opening`."""

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Limit all conversations rendered within the block together."""
        self._budget = TEMPLATE_OPENING.seconds
        try:
            yield
        finally:
            self._budget = None

    def source(self, tools: Tools | None) -> str:
        """Return the Jinja text; a tokenizer may have a separate one for conversations with tools."""
        has_tools = bool(tools)
        if has_tools not in self._sources:
            source = freeze_date(self.tokenizer.get_chat_template(tools=tools or None), self.date)
            self._try(source)
            self._sources[has_tools] = source
        return self._sources[has_tools]

    def has_marks(self, tools: Tools | None) -> bool:
        """Return whether the template itself marks what is trained (`{% generation %}`)."""
        return bool(_GENERATION_TAG.search(self.source(tools)))

    def text(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        arguments: Mapping[str, Any] | None = None,
        prompt: bool = False,
    ) -> str:
        """Return the rendered conversation; with `prompt`, the generation prompt follows it. Raises RenderError.

        arguments: override those of the run.
        """
        source = self.source(tools)
        if self._is_rendered_apart:
            return self._render_apart(messages, source, tools, arguments, prompt).text
        with self._within_limits():
            rendered = self.tokenizer.apply_chat_template(
                visible_messages(messages, source),
                tools=tools or None,
                chat_template=source,
                add_generation_prompt=prompt,
                tokenize=False,
                **(self.arguments | dict(arguments or {})),
            )
        return str(rendered)

    @property
    def _is_rendered_apart(self) -> bool:
        """Whether a process of its own renders: in a thread, in which no timer ends what takes too long, if the template is one of
        Jinja."""
        is_jinja = type(self.tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        return is_jinja and threading.current_thread() is not threading.main_thread()

    def _render_apart(
        self,
        messages: Messages,
        source: str,
        tools: Tools | None,
        arguments: Mapping[str, Any] | None,
        prompt: bool,
        is_marked: bool = False,
    ) -> rendering.Rendered:
        """Render in a process of its own. is_marked: find out what the template marks. Raises RenderError, or UserError within
        `opening`."""
        variables = {
            **self.tokenizer.special_tokens_map,
            **self.arguments,
            **dict(arguments or {}),
            "messages": visible_messages(messages, source),
            "tools": tools or None,
            "chat_template": source,
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": is_marked,
        }
        seconds = TEMPLATE.seconds if self._budget is None else self._budget
        try:
            rendered = rendering.render(variables, seconds)
        except (TypeError, ValueError) as error:
            raise RenderError(f"in a thread, a conversation is JSON: {first_line(error)}") from None
        except rendering.TemplateError as error:
            raise TemplateRefusal(f"the chat template refuses this conversation: {error}") from None
        except ProcessEnded:
            excess = f"takes more than {seconds:g} s, or than {TEMPLATE.added_bytes / 2**30:g} GiB of memory"
            if self._budget is not None:
                raise UserError(_unsafe_template(f"to print a few short conversations {excess}")) from None
            raise RenderError(f"to print this conversation the chat template {excess}") from None
        if self._budget is not None:
            self._budget = max(self._budget - rendered.seconds, 0.001)
        return rendered

    def _try(self, source: str) -> None:
        """Render made-up conversations in a process that can be killed. Raises UserError if it had to be killed.

        A template is a program: `{{ 10**(10**9) }}` would block this process, and no signal could interrupt it.
        """

        def render() -> None:
            for messages, prompt in _TRIED:
                try:
                    self.tokenizer.apply_chat_template(
                        messages, chat_template=source, add_generation_prompt=prompt, tokenize=False, **self.arguments
                    )
                except MemoryError:
                    raise
                except Exception:  # the template may rightly refuse this conversation
                    continue

        if reason := trial("to print a conversation of three messages", source, render, TEMPLATE_TRIAL):
            raise UserError(_unsafe_template(reason))

    @contextmanager
    def _within_limits(self) -> Iterator[None]:
        """Limit the rendering within the block.

        Raises RenderError for whatever the template raises or exceeds. Raises UserError if it exceeds the limits in `opening`, or
        too often.
        """
        began = time.process_time()
        limits = TEMPLATE if self._budget is None else replace(TEMPLATE_OPENING, seconds=self._budget)
        try:
            # The budget of the opening may be down to a millisecond, too short to kill the process after.
            with limited(limits, ended_after=5 * TEMPLATE.seconds):
                yield
        except TooMuch as error:
            if self._budget is not None:
                raise UserError(_unsafe_template(f"to print a few short conversations {error}")) from None
            self._slow_rows += 1
            if self._slow_rows >= MAX_SLOW_ROWS:
                reason = f"to print each of {MAX_SLOW_ROWS} conversations {error}"
                raise UserError(_unsafe_template(reason)) from None
            raise RenderError(f"to print this conversation the chat template {error}") from None
        except UserError:
            raise
        except Exception as error:  # a template is a program by a stranger: it may raise anything
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
        """Render like `text`, but without copying and checking the messages: 3 times as fast, and the same for rows of plain JSON.

        A conversation of ten exchanges is rendered 20 times; `agrees` compares the two methods once for each row.
        """
        if _compile_template is None or self._is_rendered_apart:
            return self.text(messages, tools=tools, arguments=arguments, prompt=prompt)
        variables = self.tokenizer.special_tokens_map | self.arguments | dict(arguments or {})
        source = self.source(tools)
        with self._within_limits():
            template = _compile_template(source)
            rendered = template.render(
                messages=visible_messages(messages, source),
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
                **variables,
            )
        return str(rendered)

    def agrees(self, messages: Messages, *, tools: Tools | None, arguments: Mapping[str, Any] | None) -> bool:
        """Return whether `direct` renders the conversation the way `text` does. Raises RenderError if `text` does."""
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
        """Return the characters of `text` that the template marks with `{% generation %}`, sorted. Raises RenderError."""
        variables = {**self.tokenizer.special_tokens_map, **self.arguments, **dict(arguments or {})}
        source = self.source(tools)
        if self._is_rendered_apart:
            return sorted(self._render_apart(messages, source, tools, arguments, prompt, is_marked=True).marks)
        with self._within_limits():
            _, indices = render_jinja_template(
                conversations=[visible_messages(messages, source)],
                tools=tools or None,
                chat_template=source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=prompt,
                **variables,
            )
        return sorted((start, end) for start, end in indices[0])


def visible_messages(messages: Messages, source: str) -> Messages:
    """Return `messages` as the template `source` gets to see them."""
    unweighted = [{key: value for key, value in message.items() if key not in _LOSS_KEYS} for message in messages]
    return as_template_reads(unweighted, source)


def _unsafe_template(reason: str) -> Problem:
    fix = "set model.chat_template to a template that you trust, for example one of those in docs/chat-templates.md"
    return Problem("model.chat_template", f"the chat template is refused: {reason}", fix)


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """Return `template` with `arguments` built in as defaults for when the caller does not pass them."""
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
"""Moves reasoning from its separate field to the beginning of the content, as `thoughts.inlined` does."""


def with_inlined_reasoning(template: str, marks: tuple[str, str], turns: Collection[bool]) -> str:
    """Return `template` changed to write reasoning from a separate field at the beginning of the content, between `marks`.

    A model trained so writes its reasoning into the content, but a client may send it back in a separate field, which the
    original template does not know and would drop. turns: the kinds of turns to change: those that call tools (True), others
    (False).
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
    """Return a JSON value as a Jinja literal."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
