"""Render conversations with the model's chat template and find, for any template, which tokens the assistant says.

A template is a program: it may add a system prompt, trim a message, or rewrite the history (thinking removed from
earlier turns). So the assistant's share is not searched for in the rendered text; it is followed through the template:

1. Where the template marks it (`{% generation %}`), the marks are taken, extended by an end of turn left outside.
2. Else the conversation is rendered twice, once with unique invisible marks at the edges of its messages. If the two
   differ in nothing but the marks, the marks show where each message ended up. A turn starts where the generation
   prompt ends, for that is where the model starts to write, and runs through its end-of-turn token.
3. Where marks change what the template does, `messages[:k]` with generation prompt and `messages[:k + 1]` are
   rendered; both must be beginnings of the whole.
4. Where that fails too, `RenderError` says so: a wrong mask is worse than none.

The text is tokenized once, as a whole; spans of characters become a mask of tokens through the tokenizer's offsets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from typing import Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from dstune.data.control import ControlTokens
from dstune.data.template_date import freeze_date
from dstune.errors import Problem, UserError

Messages = list[dict[str, Any]]
Span = tuple[int, int]
"""Characters [start, end) of the rendered text."""

_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD  # Private Use Area A: never assigned, and no template looks for them
_MARKS = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


class RenderError(ValueError):
    """This conversation cannot be rendered or its targets cannot be found; the text says why."""


class _Inconsistent(Exception):
    """The way just tried does not fit the template; another one may."""


def require_offsets(tokenizer: Any) -> None:
    """Raises UserError if the tokenizer cannot tell which characters a token stands for."""
    if not tokenizer.is_fast:
        raise UserError(
            Problem(
                where="model.path",
                reason="the tokenizer gives no offsets, which task=chat needs to find the tokens to train on",
                fix="convert it to a tokenizer.json (a fast tokenizer)",
            )
        )


def target_mask(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens hold characters of a span: bool [tokens].

    offsets: first and last character (exclusive) of each token, [tokens, 2]; spans: sorted and disjoint. A token that
    reaches over the edge of a span counts: leaving it out would lose characters that the assistant wrote.
    """
    if not spans or not len(offsets):
        return np.zeros(len(offsets), dtype=bool)
    starts, ends = np.array(spans).T
    first, last = offsets[:, 0], offsets[:, 1]
    # The only span that can hold a token is the first one that ends after the token's first character.
    nearest = np.searchsorted(ends, first, side="right")
    inside = nearest < len(ends)
    nearest = np.minimum(nearest, len(ends) - 1)
    # Some tokenizers trim white space off the offsets: a token of white space alone is empty then, and still counts.
    return inside & np.where(last > first, last > starts[nearest], first >= starts[nearest])


@dataclass(frozen=True)
class _Marked:
    """Where the template put the messages: character positions in the rendered text, by message number."""

    starts: dict[int, int]
    ends: dict[int, int]


class ChatRenderer:
    """Renders conversations for one tokenizer and finds the assistant's characters in them.

    Raises UserError if the tokenizer has no chat template, no offsets, or a template whose assistant turns have no end.
    """

    def __init__(self, tokenizer: Any, template_date: str | None):
        if not tokenizer.chat_template:
            raise UserError(
                Problem(
                    where="model.chat_template",
                    reason="the model has no chat template, so task=chat cannot tell who speaks",
                    fix="set model.chat_template to a Jinja file, or choose a model tuned for chat",
                )
            )
        require_offsets(tokenizer)
        self._tokenizer = tokenizer
        self._control = ControlTokens(tokenizer)
        self._date = template_date
        self._templates: dict[bool, str] = {}
        self._openings: dict[str, str] = {}
        special = sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
        # White space can be an added token (Gemma), but it ends no turn.
        self._special = re.compile("|".join(re.escape(text) for text in special if text.strip()) or r"(?!)")
        self._learn_end_of_turn()

    def text(self, messages: Messages, *, tools: list[dict] | None = None, add_generation_prompt: bool = False) -> str:
        """The rendered conversation. Raises RenderError if the template refuses it."""
        try:
            return self._tokenizer.apply_chat_template(
                _without_weights(messages),
                tools=tools,
                chat_template=self._template(tools),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except _TEMPLATE_ERRORS as error:
            raise RenderError(f"the chat template refuses this conversation: {_first_line(error)}") from None

    def prompt_ids(self, messages: Messages, *, tools: list[dict] | None = None) -> list[int]:
        """Tokens of the conversation so far and of the generation prompt: where the assistant is to speak next."""
        defused = self._control.defuse({"messages": messages, "tools": tools})
        text = self.text(defused.value["messages"], tools=defused.value["tools"], add_generation_prompt=True)
        return self._control.encode(*defused.restore(text))[0]

    def spans(self, messages: Messages, *, tools: list[dict] | None = None, weight: int = 1) -> tuple[str, list[Span]]:
        """The rendered conversation, and in it the characters that the assistant writes, turn ends included.

        Those of messages with this `weight` (0 or 1, and 1 for a message without one).
        Raises RenderError if the template refuses the conversation or the characters cannot be told.
        """
        chosen = [message.get("weight", 1) == weight for message in messages if message["role"] == "assistant"]
        if _GENERATION_TAG.search(self._template(tools)):
            text, spans = self._generation_spans(messages, tools)
            if all(chosen):
                return text, _joined(spans)
            if len(spans) == len(chosen):
                return text, _joined(compress(spans, chosen))
            # Marks that do not stand for one message each do not tell whose they are; the other ways do.
        text = self.text(messages, tools=tools)
        if not any(chosen):
            return text, []
        for find in (self._spans_by_edges, self._spans_by_middles, self._spans_by_prefixes):
            with suppress(_Inconsistent, RenderError):
                return text, list(compress(find(text, messages, tools), chosen))
        raise RenderError(
            "the chat template rewrites this conversation so that the assistant's tokens cannot be told "
            "(add {% generation %} marks to the template)"
        )

    def _template(self, tools: list[dict] | None) -> str:
        has_tools = bool(tools)
        if has_tools not in self._templates:
            template = self._tokenizer.get_chat_template(tools=tools)
            self._templates[has_tools] = freeze_date(template, self._date)
        return self._templates[has_tools]

    # The end of a turn

    def _learn_end_of_turn(self) -> None:
        """Learn from made-up conversations which special token (or plain text) ends an assistant's turn."""
        user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
        try:
            final = self._closing([user, assistant], 1)
            middle = self._closing([user, assistant, user, assistant], 1)
            self._has_generation_prompt = self.text([user]) != self.text([user], add_generation_prompt=True)
            user_closing = self._user_closing(user)
        except (_Inconsistent, RenderError) as error:
            raise UserError(
                Problem(
                    where="model.chat_template",
                    reason=str(error) or "the template does not print each message once and as it is",
                    fix="set model.chat_template to a template for conversations of user and assistant",
                )
            ) from None
        ends = {self._tokenizer.eos_token} - {None}
        for closing in (final, user_closing):
            if found := self._special.search(closing):
                ends.add(found.group())
        self._end = re.compile("|".join(re.escape(text) for text in sorted(ends, key=len, reverse=True)) or r"(?!)")
        self._plain_end = ""
        self._closings = {closing[: found.end()] for closing in (final, middle) if (found := self._end.search(closing))}
        if not self._closings:
            # No special token: then the text that follows every turn is what the model has to learn to stop with.
            self._plain_end = _common_beginning(final, middle)
            self._closings = {self._plain_end}
        if self._closings == {""}:
            raise UserError(
                Problem(
                    where="model.chat_template",
                    reason="the template ends assistant turns with nothing, so the model would never learn to stop",
                    fix="print the end-of-turn token after each assistant message, for example {{ eos_token }}",
                )
            )

    def _closing(self, messages: Messages, number: int) -> str:
        """What follows message `number` up to the next message (its opening included) or the end."""
        text = self.text(messages)
        marked = self._marked(text, self._edges(messages), None)
        if number not in marked.ends:
            raise _Inconsistent
        return text[marked.ends[number] : marked.starts.get(number + 1, len(text))]

    def _user_closing(self, user: dict[str, Any]) -> str:
        """What the template prints between a user's message and the generation prompt."""
        # Without a generation prompt the text after a user's message may already open the assistant's turn ([/INST]).
        return self._closing([user], 0) if self._has_generation_prompt else ""

    def _turn_end(self, text: str, start: int, limit: int, message: dict[str, Any]) -> int:
        """Where the turn ends whose content ended at `start`; the next message starts at `limit` or later."""
        if found := self._end.search(text, start, limit):
            return found.end()
        if message.get("tool_calls") and (found := self._special.search(text, start, limit)):
            return found.end()  # some models end a tool call with a token of its own (<|eom_id|>)
        if self._plain_end and text.startswith(self._plain_end, start):
            return start + len(self._plain_end)
        return start

    # 1. The template's own marks

    def _generation_spans(self, messages: Messages, tools: list[dict] | None) -> tuple[str, list[Span]]:
        try:
            rendered, indices = render_jinja_template(
                conversations=[_without_weights(messages)],
                tools=tools,
                chat_template=self._template(tools),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except _TEMPLATE_ERRORS as error:
            raise RenderError(f"the chat template refuses this conversation: {_first_line(error)}") from None
        text = rendered[0]
        spans: list[Span] = []
        for start, end in sorted(indices[0]):
            for closing in self._closings:
                if text.startswith(closing, end) and not text.endswith(closing, start, end):
                    end += len(closing)
                    break
            spans.append((start, end))
        return text, spans

    # 2. Marks at the edges or in the middle of messages

    def _edges(self, messages: Messages) -> Messages:
        """`messages` with marks around each content; outer white space stays outside, as many templates trim it."""
        return [
            message if not _markable(message) else {**message, "content": _with_edges(message["content"], number)}
            for number, message in enumerate(messages)
        ]

    def _middles(self, messages: Messages) -> Messages:
        """As `_edges`, but with one mark in the middle of what is not the assistant's: some templates look at how a
        message starts or ends (Qwen3: `<tool_response>`). A message with tool calls gets none: some templates ask
        whether anything is said beside the call, and the end of the turn can be found without."""
        marked = self._edges(messages)
        for number, message in enumerate(messages):
            if message.get("tool_calls"):
                marked[number] = message
            elif _markable(message) and message["role"] != "assistant":
                content, half = message["content"], len(message["content"]) // 2
                marked[number] = {**message, "content": content[:half] + _end_mark(number) + content[half:]}
        return marked

    def _marked(self, text: str, twin: Messages, tools: list[dict] | None, *, prompt: bool = False) -> _Marked:
        """Where the marks of `twin` are in `text`, the same conversation rendered without them."""
        if _MARKS.search(text):
            raise _Inconsistent  # the conversation itself holds such characters
        marked_text = self.text(twin, tools=tools, add_generation_prompt=prompt)
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        previous = -1
        for seen, found in enumerate(_MARKS.finditer(marked_text)):
            code = ord(found.group()) - _FIRST_MARK
            if code <= previous:
                raise _Inconsistent  # a message printed twice, or in another order
            previous = code
            (ends if code % 2 else starts)[code // 2] = found.start() - seen
        if _MARKS.sub("", marked_text) != text:
            raise _Inconsistent  # the marks changed what the template does
        return _Marked(starts, ends)

    def _spans_by_edges(self, text: str, messages: Messages, tools: list[dict] | None) -> list[Span]:
        twin = self._edges(messages)
        return self._spans_from(text, messages, tools, twin, self._marked(text, twin, tools))

    def _spans_by_middles(self, text: str, messages: Messages, tools: list[dict] | None) -> list[Span]:
        twin = self._middles(messages)
        marked = self._marked(text, twin, tools)
        starts, ends = dict(marked.starts), dict(marked.ends)
        for number, message in enumerate(messages):
            if message["role"] != "assistant" and number in ends:
                starts[number] = ends[number]
                ends[number] = _skip(text, ends[number], _second_half(message))
        return self._spans_from(text, messages, tools, twin, _Marked(starts, ends))

    def _spans_from(
        self, text: str, messages: Messages, tools: list[dict] | None, twin: Messages, marked: _Marked
    ) -> list[Span]:
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if _markable(message) and number not in marked.ends and not message.get("tool_calls"):
                raise _Inconsistent
            start = self._turn_start(text, messages, tools, twin, marked, number)
            written = marked.ends.get(number, start)
            limit = marked.starts.get(number + 1, len(text))
            end = self._turn_end(text, written, limit, message)
            if not (spans[-1][1] if spans else 0) <= start <= end:
                raise _Inconsistent
            spans.append((start, end))
        return spans

    def _turn_start(
        self, text: str, messages: Messages, tools: list[dict] | None, twin: Messages, marked: _Marked, number: int
    ) -> int:
        """Where the generation prompt of the turn `number` ends."""
        if number - 1 not in marked.ends:
            raise _Inconsistent
        before = marked.ends[number - 1]
        content = marked.starts.get(number)
        asked = messages[number - 1]
        trailing = asked["content"][len(asked["content"].rstrip()) :]
        # Probed once for each role that can speak before; where that does not fit, once more for this very turn.
        for opening in self._opening_candidates(asked["role"], messages[:number], tools, twin[:number]):
            for expected in (opening, trailing + opening):
                start = before + len(expected)
                if not text.startswith(expected, before) or start > marked.ends.get(number, start):
                    continue
                if content is not None and not self._has_generation_prompt and text[start:content].strip():
                    return content  # a heading that a template without generation prompt prints for finished turns
                return start
            if content is not None and opening.startswith(text[before:content]):
                return content  # the generation prompt opens something (<think>) that this turn left out
        raise _Inconsistent

    def _opening_candidates(
        self, role: str, messages: Messages, tools: list[dict] | None, twin: Messages
    ) -> Iterator[str]:
        if role in self._openings:
            yield self._openings[role]
        opening = self._opening(messages, tools, twin)
        if not messages[-1]["content"][-1:].isspace():
            self._openings.setdefault(role, opening)
        yield opening

    def _opening(self, messages: Messages, tools: list[dict] | None, twin: Messages) -> str:
        """What stands between the last of `messages` and the place where the assistant starts to write."""
        text = self.text(messages, tools=tools, add_generation_prompt=True)
        marked = self._marked(text, twin, tools, prompt=True)
        last = len(messages) - 1
        if last not in marked.ends:
            raise _Inconsistent
        at = marked.ends[last]
        if last not in marked.starts:  # marked in the middle: the second half of the message comes first
            at = _skip(text, at, _second_half(messages[last]))
        return text[at:]

    # 3. Beginnings of the conversation

    def _spans_by_prefixes(self, text: str, messages: Messages, tools: list[dict] | None) -> list[Span]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.text(messages[:number], tools=tools, add_generation_prompt=True)
            answered = self.text(messages[: number + 1], tools=tools)
            if not (text.startswith(answered) and answered.startswith(prompt)):
                raise _Inconsistent
            # The turn's own end is the last one in what it added.
            found = list(self._end.finditer(answered, len(prompt)))
            if not found:
                raise _Inconsistent
            spans.append((len(prompt), found[-1].end()))
        return spans


def _without_weights(messages: Messages) -> Messages:
    """What a template gets to see: `weight` is for the loss, not for the model."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _joined(spans: Iterable[Span]) -> list[Span]:
    """`spans`, sorted by their starts, with those that touch made one and empty ones left out."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and start <= joined[-1][1]:
            start, end = joined[-1][0], max(end, joined.pop()[1])
        if end > start:
            joined.append((start, end))
    return joined


def _markable(message: dict[str, Any]) -> bool:
    """An empty message gets no mark: many templates ask whether there is a content."""
    return message["role"] != "system" and bool((message.get("content") or "").strip())


def _with_edges(content: str, number: int) -> str:
    stripped = content.strip()
    before = content[: len(content) - len(content.lstrip())]
    after = content[len(content.rstrip()) :]
    return before + chr(_FIRST_MARK + 2 * number) + stripped + _end_mark(number) + after


def _second_half(message: dict[str, Any]) -> str:
    """What follows the mark in the middle, without white space at the end, which many templates trim."""
    return message["content"][len(message["content"]) // 2 :].rstrip()


def _skip(text: str, position: int, expected: str) -> int:
    if not text.startswith(expected, position):
        raise _Inconsistent  # the template changed the message's text
    return position + len(expected)


def _end_mark(number: int) -> str:
    return chr(_FIRST_MARK + 2 * number + 1)


def _common_beginning(first: str, second: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[:length] if length is not None else min(first, second, key=len)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
