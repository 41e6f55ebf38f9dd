"""Find out what a chat template prints and which input it expects, by rendering made-up conversations with a marker in each field.

A template is a program. Many silently drop tool calls or reasoning, which then could not be trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from dstune.data.chat.call_ids import CallIds, with_call_ids
from dstune.data.chat.rule import RuleError, Stops, alternatives, in_common
from dstune.data.chat.template import ChatTemplate, Messages, RenderError, Tools
from dstune.data.chat.thoughts import inlined
from dstune.data.message import REASONING_KEYS, content_start, with_start

SWITCHES = ("enable_thinking", "thinking")
"""Template arguments that say whether the model should think."""

_QUESTION = {"role": "user", "content": "qzquestion"}
_ANSWER = {"role": "assistant", "content": "qzanswer"}
_RESULT = {"role": "tool", "content": "qzresult", "tool_call_id": "qzcall001", "name": "qzfirst"}


_LONG_ID = "call_qz0123456789abcdefghij"
"""An id of a call in OpenAI's form."""

_INLINE = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
"""Reasoning at the start of a content, and the answer after it."""


def _call(name: str, arguments: Any, number: str) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def _schema(name: str) -> dict[str, Any]:
    described = {"type": "string", "description": "qzparameter"}
    parameters = {"type": "object", "properties": {"qzkey": described}, "required": ["qzkey"]}
    return {"type": "function", "function": {"name": name, "description": "qzschema", "parameters": parameters}}


_TOOLS = [_schema("qzfirst"), _schema("qzsecond")]


@dataclass(frozen=True)
class Facts:
    """What a template does with the fields that a conversation may have."""

    reasoning_key: str | None
    """The name under which the template reads reasoning; None if it prints none. `content`: it opens `<think>` in the prompt and
    reads no field, so reasoning has to begin the content. `part`: reasoning is a part of the content (Ministral 3)."""
    switch: str | None
    """The argument that tells the template whether the model should think."""
    prints_system: bool
    prints_tools: bool
    """Whether it prints the names of the tools that may be called."""
    prints_schemas: bool
    """Whether it prints the descriptions and parameters of these tools."""
    prints_calls: bool
    """Whether it prints the names and arguments of calls."""
    prints_several_calls: bool
    prints_results: bool
    arguments_as_text: bool
    """Whether it concatenates arguments, which then have to be JSON text, instead of printing an object."""
    empty_content: bool
    """Whether a message with calls needs a content, even an empty one."""
    call_ids: CallIds = CallIds.any
    """The form that call ids must have for the template to print the calls."""
    splits_reasoning: bool = True
    """Whether content with `<think>...</think>` may stay as it is: the template handles it like a field, or has no such field."""
    reasons_in: frozenset[bool] = frozenset()
    """The kinds of turns whose reasoning it prints: turns that call tools (True), other turns (False)."""

    def adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return `message` in the form that the template reads; equal to `message` if it has that form already."""
        changed, content = dict(message), message.get("content")
        split = not self.splits_reasoning and message["role"] == "assistant"
        if split and (inline := _INLINE.match(content_start(content))):
            changed |= {"reasoning_content": inline.group(1).strip(), "content": with_start(content, inline.group(2))}
        reasoning = reasoning_of(changed)
        if reasoning is not None and self.reasoning_key == "content":
            changed = {key: value for key, value in changed.items() if key not in REASONING_KEYS}
            changed["content"] = with_start(content, _inline(reasoning, content_start(content)))
        elif reasoning is not None and self.reasoning_key == "part":
            changed["content"] = [{"type": "thinking", "thinking": reasoning}, *_text_parts(changed.get("content"))]
        elif reasoning is not None:  # under every name, as newer versions of transformers do themselves
            absent = {key: reasoning for key in REASONING_KEYS if key not in changed}
            changed = {**changed, "reasoning_content": reasoning, **absent}
        calls = message.get("tool_calls")
        if calls and not changed.get("content"):  # absent, null and empty mean the same; transformers leaves out null
            changed.pop("content", None)
            if self.empty_content:
                changed["content"] = ""
        if calls and self.arguments_as_text:
            changed["tool_calls"] = [_with_text(call) for call in calls]
        return changed


def reasoning_of(message: Mapping[str, Any]) -> str | None:
    """Return the reasoning that a message has in a separate field; None if it has none."""
    reasoning = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")
    return reasoning if reasoning.strip() else None


def _inline(reasoning: str, content: str) -> str:
    return f"<think>\n{reasoning.strip()}\n</think>\n" + (f"\n{content}" if content else "")


def _text_parts(content: Any) -> list[dict[str, str]]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """Return the tool call with its arguments as JSON text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def facts_of(template: ChatTemplate) -> Facts:
    """Return the facts about a template, found by rendering a few dozen short conversations."""
    switch = _switch(template)
    thinking = {} if switch is None else {switch: True}
    as_text, empty, printed, call_ids = _calls(template)
    facts = Facts(None, switch, True, True, True, printed, True, True, as_text, empty, call_ids)
    call_message = facts.adapted(
        {"role": "assistant", "tool_calls": [_call("qzfirst", {"qzkey": "qzvalue"}, "qzcall001")]}
    )
    both = facts.adapted(
        {
            "role": "assistant",
            "tool_calls": [
                _call("qzfirst", {"qzkey": "qzvalue"}, "qzcall001"),
                _call("qzsecond", {"qzkey": "qzother"}, "qzcall002"),
            ],
        }
    )
    (call_message, answered), (both,) = (
        with_call_ids(conversation, call_ids) for conversation in ([call_message, _RESULT], [both])
    )
    reasoning_key, reasons_in = _reasoning(template, {False: _ANSWER, True: call_message}, thinking)
    return Facts(
        reasoning_key=reasoning_key,
        switch=switch,
        prints_system=_prints(
            template, [{"role": "system", "content": "qzsystem"}, _QUESTION], "qzsystem", prompt=True
        ),
        prints_tools=_prints(template, [_QUESTION], "qzfirst", tools=_TOOLS, prompt=True),
        prints_schemas=all(
            _prints(template, [_QUESTION], marker, tools=_TOOLS, prompt=True) for marker in ("qzschema", "qzkey")
        ),
        prints_calls=printed,
        prints_several_calls=printed and _prints(template, [_QUESTION, both], "qzother", tools=_TOOLS),
        prints_results=_prints(template, [_QUESTION, call_message, answered], "qzresult", tools=_TOOLS, prompt=True),
        arguments_as_text=as_text,
        empty_content=empty,
        call_ids=call_ids,
        splits_reasoning=reasoning_key in (None, "content", "part") or _splits(template, thinking),
        reasons_in=reasons_in,
    )


def _reasoning(
    template: ChatTemplate, turns: Mapping[bool, dict[str, Any]], thinking: Mapping[str, Any]
) -> tuple[str | None, frozenset[bool]]:
    """Return the name under which the template reads reasoning, and the kinds of turns in which it prints it. turns: one of each
    kind, by whether it calls tools."""

    def shows(turn: dict[str, Any], calls: bool) -> bool:
        options: dict[str, Any] = {"tools": _TOOLS} if calls else {}
        return _prints(template, [_QUESTION, turn], "qzreasoning", arguments=thinking, refused=False, **options)

    for key in REASONING_KEYS:
        if any(
            _prints(
                template, [_QUESTION, {**turn, key: "qzreasoning"}], "qzreasoning", arguments=thinking, refused=False
            )
            for turn in turns.values()
        ):
            every = dict.fromkeys(REASONING_KEYS, "qzreasoning")
            return key, frozenset(calls for calls, turn in turns.items() if shows({**turn, **every}, calls))
    if _opens_thinking(template, thinking):
        return "content", frozenset(turns)
    thought = {"type": "thinking", "thinking": "qzreasoning"}
    in_parts = {
        calls: {**turn, "content": [thought, *_text_parts(turn.get("content"))]} for calls, turn in turns.items()
    }
    if _reads_thoughts(template, in_parts[False]):
        return "part", frozenset(calls for calls, turn in in_parts.items() if shows(turn, calls))
    return None, frozenset()


def _reads_thoughts(template: ChatTemplate, turn: dict[str, Any]) -> bool:
    """Return whether the template prints a content part that is a thought, instead of the Python form of the list."""
    try:
        text = template.text([_QUESTION, turn])
    except RenderError:
        return False
    return "qzreasoning" in text and "'thinking'" not in text


def prints_inline(template: ChatTemplate, facts: Facts, marks: tuple[str, str]) -> frozenset[bool]:
    """Return the kinds of turns in which the template prints reasoning at the beginning of the content, between `marks`: turns that
    call tools (True), other turns (False)."""
    call_message = facts.adapted(
        {"role": "assistant", "tool_calls": [_call("qzfirst", {"qzkey": "qzvalue"}, "qzcall001")]}
    )
    turns = {False: _ANSWER, True: with_call_ids([call_message], facts.call_ids)[0]}
    thinking = {} if facts.switch is None else {facts.switch: True}
    printing = set()
    for calls, turn in turns.items():
        content = inlined(turn.get("content") or "", "qzreasoning", marks)
        try:
            text = template.text(
                [_QUESTION, {**turn, "content": content}], tools=_TOOLS if calls else None, arguments=thinking
            )
        except RenderError:
            continue
        text_before, printed, _ = text.partition("qzreasoning")
        # If the template prints its own thought before (Kimi K2 Thinking), a client would send both back and get a third one.
        if printed and not text_before.rstrip().removesuffix(marks[0].strip()).rstrip().endswith(marks[1]):
            printing.add(calls)
    return frozenset(printing)


def _opens_thinking(template: ChatTemplate, thinking: Mapping[str, Any]) -> bool:
    """Return whether the prompt ends with `<think>` and an answer that begins with its reasoning continues from there (QwQ)."""
    answer = {**_ANSWER, "content": _inline("qzreasoning", "qzanswer")}
    try:
        prompt = template.text([_QUESTION], arguments=thinking, prompt=True)
        answered = template.text([_QUESTION, answer], arguments=thinking)
    except RenderError:
        return False
    return prompt.rstrip().endswith("<think>") and answered.startswith(prompt) and "qzreasoning" in answered


def _splits(template: ChatTemplate, thinking: Mapping[str, Any]) -> bool:
    """Return whether the template prints reasoning in the content the same way as in a separate field, or reads no such field."""
    apart = {**_ANSWER, "reasoning_content": "qzreasoning"}
    inline = {**_ANSWER, "content": _inline("qzreasoning", "qzanswer")}
    try:
        first, second = (template.text([_QUESTION, answer], arguments=thinking) for answer in (apart, inline))
    except RenderError:
        return True
    return first == second or "qzreasoning" not in first


def _prints(
    template: ChatTemplate,
    messages: Messages,
    marker: str,
    *,
    tools: Tools | None = None,
    arguments: Mapping[str, Any] | None = None,
    prompt: bool = False,
    refused: bool = True,
) -> bool:
    """Return whether the template prints the marker; `refused` if it refuses the conversation, as it will then refuse the row."""
    try:
        return marker in template.text(messages, tools=tools, arguments=arguments, prompt=prompt)
    except RenderError:
        return refused


def _switch(template: ChatTemplate) -> str | None:
    """Return the argument that changes what the template prints for a question and its answer."""
    thought = {**_ANSWER, "reasoning_content": "qzreasoning"}
    for name in SWITCHES:
        if name not in template.source(None) or name in template.arguments:
            continue
        for messages, prompt in (([_QUESTION], True), ([_QUESTION, thought], False)):
            texts = set()
            for value in (True, False):
                try:
                    texts.add(template.text(messages, arguments={name: value}, prompt=prompt))
                except RenderError:
                    break
            if len(texts) == 2:
                return name
    return None


def _calls(template: ChatTemplate) -> tuple[bool, bool, bool, CallIds]:
    """Return (arguments must be text, a content is needed, calls are printed, the form of their ids) for the first way in which the
    template prints calls completely. Ways that also render when the conversation continues are preferred."""
    refused = False
    ways = ((False, False), (False, True), (True, False), (True, True))
    for goes_on, form, (as_text, empty) in product((True, False), CallIds, ways):
        call_arguments: Any = '{"qzkey": "qzvalue"}' if as_text else {"qzkey": "qzvalue"}
        message: dict[str, Any] = {"role": "assistant", "tool_calls": [_call("qzfirst", call_arguments, _LONG_ID)]}
        if empty:
            message["content"] = ""
        message, answered = with_call_ids([message, {**_RESULT, "tool_call_id": _LONG_ID}], form)
        try:
            text = template.text([_QUESTION, message], tools=_TOOLS)
            prompt = template.text([_QUESTION], tools=_TOOLS, prompt=True)
            if goes_on:
                template.text([_QUESTION, message, answered, _ANSWER], tools=_TOOLS)
        except RenderError:
            refused = True
            continue
        added = text[len(prompt) :] if text.startswith(prompt) else text
        # A concatenated object appears in Python's form, and a text printed as JSON is quoted twice.
        written = "qzfirst" in added and "qzvalue" in added and "'qzkey'" not in added and '\\"qzkey' not in added
        if written:
            return as_text, empty, True, form
        refused = False
    return False, False, refused, CallIds.any


def learn_stops(template: ChatTemplate, facts: Facts, known_tokens: frozenset[str]) -> Stops:
    """Find what ends a turn: `known_tokens` (of the tokenizer and the generation settings), and what the template prints.

    Raises RuleError if nothing does, RenderError if the template refuses a question and its answer.
    """
    special = alternatives(token.content for token in template.tokenizer.added_tokens_decoder.values())
    try:
        final, middle = _behind(template, [_QUESTION, _ANSWER], "qzanswer", [_QUESTION])
    except RenderError:  # a template for conversations with tools only
        final, middle = _behind(template, [_QUESTION, _ANSWER], "qzanswer", [_QUESTION], tools=_TOOLS)
    tokens, supplied, plain = set(known_tokens), {}, ""
    if not alternatives(known_tokens).search(final):
        if learnt := _last(final, special):
            tokens.add(learnt)
        elif opening := special.match(middle.removeprefix(final).lstrip()):
            supplied = {False: opening.group(), True: opening.group()}
        else:
            plain = final[: in_common(final, middle)]
            if not plain:
                raise RuleError(
                    "the template ends assistant turns with nothing, so the model would never learn to stop"
                )
    if facts.prints_calls:
        for of_calls, token in _stops_of_calls(template, facts, frozenset(tokens), special):
            if of_calls:
                supplied[True] = token
            else:
                tokens.add(token)
    return Stops(frozenset(tokens), plain, final if plain else "", supplied)


def _stops_of_calls(
    template: ChatTemplate, facts: Facts, known_tokens: frozenset[str], special: Any
) -> Iterator[tuple[bool, str]]:
    """Yield the token that ends a turn with calls if no known one does, as (whether the token must be supplied, token)."""
    first = _call("qzfirst", {"qzkey": "qzvalue"}, "qzcall001")
    second = _call("qzsecond", {"qzkey": "qzvalue"}, "qzcall002")
    call_message = facts.adapted({"role": "assistant", "tool_calls": [first]})
    call_message, answered = with_call_ids([call_message, _RESULT], facts.call_ids)
    try:
        final, middle = _behind(template, [_QUESTION, call_message], "qzvalue", [answered], tools=_TOOLS)
    except (RenderError, RuleError):
        return
    if alternatives(known_tokens).search(final):
        return
    opening = special.match(middle.removeprefix(final).lstrip())
    if learnt := _last(final, special):
        (both,) = with_call_ids([facts.adapted({"role": "assistant", "tool_calls": [first, second]})], facts.call_ids)
        try:
            text_behind, _ = _behind(template, [_QUESTION, both], "qzvalue", [], tools=_TOOLS)
            repeated = template.text([_QUESTION, both], tools=_TOOLS).count(learnt) > text_behind.count(
                learnt
            ) + template.text([_QUESTION], tools=_TOOLS, prompt=True).count(learnt)
        except (RenderError, RuleError):
            repeated = False
        # A token after each of several calls ends a call, not the turn.
        if not repeated:
            yield False, learnt
            return
    if opening:
        yield True, opening.group()


def _behind(
    template: ChatTemplate, messages: Messages, marker: str, following: Messages, *, tools: Tools | None = None
) -> tuple[str, str]:
    """Return what the template prints after the marker of `messages`: if they end the conversation, and before `following`."""
    final = template.text(messages, tools=tools)
    if marker not in final:
        raise RuleError("the template does not print what the assistant says")
    at = final.rindex(marker) + len(marker)
    follows = final
    if following:
        try:
            follows = template.text([*messages, *following], tools=tools)
        except RenderError:
            return final[at:], ""
    at_more = follows.index(marker) + len(marker) if marker in follows else len(follows)
    return final[at:], follows[at_more:]


def _last(text: str, special: Any) -> str:
    """Return the special token with which `text` ends, ignoring white space; empty if there is none."""
    matches = list(special.finditer(text))
    return matches[-1].group() if matches and not text[matches[-1].end() :].strip() else ""
