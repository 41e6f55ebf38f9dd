"""Parse tool calls from what a model writes, in the form in which its chat template renders calls."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dstune.core.parsing import whole_characters
from dstune.data.chat.template import ChatTemplate, RenderError

Call = dict[str, Any]

_NAME, _KEY, _VALUE = "zqname", "zqkey", "zqvalue"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "d",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "d"}}},
    },
}


@dataclass(frozen=True)
class ToolForm:
    """How a family of models writes calls."""

    name: str
    opening: str
    """The text with which a call begins."""
    parse: Callable[[str], list[Call] | None]
    """Returns the calls in an answer's text from the opening on; None if it cannot parse them."""


def form_of(template: ChatTemplate) -> ToolForm | None:
    """Return the form in which the template renders calls; None if it renders no tools or no calls, or in an unknown form."""
    user = {"role": "user", "content": "q"}
    calls = [{"type": "function", "id": "123456789", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}]
    try:
        prompt_with_tools = template.text([user], tools=[_TOOL], prompt=True)
        question = template.text([user])
        question_and_call = template.text([user, {"role": "assistant", "content": "", "tool_calls": calls}])
    except RenderError:
        return None
    call_text = question_and_call.removeprefix(question)
    if _NAME not in prompt_with_tools or _NAME not in call_text:
        return None
    return next(
        (
            form
            for form in FORMS
            if form.opening in call_text and form.parse(call_text[call_text.index(form.opening) :])
        ),
        None,
    )


def _parse_hermes(text: str) -> list[Call] | None:
    bodies = re.findall(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", text, re.S)
    return _calls_of(_first_json(body) for body in bodies)


def _parse_mistral(text: str) -> list[Call] | None:
    value = _first_json(text.partition("[TOOL_CALLS]")[2])
    return _calls_of(value if isinstance(value, list) else [value])


def _parse_plain_json(text: str) -> list[Call] | None:
    return _calls_of(_first_json(part) for part in text.split("<|python_tag|>")[-1].split(";"))


def _first_json(text: str) -> Any:
    """Return the JSON value at the beginning of `text`; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text.strip())[0]
    except (ValueError, RecursionError):
        return None


def _calls_of(values: Iterable[Any]) -> list[Call] | None:
    """Return the calls in OpenAI's form; None if one of `values` is no call, or there are none."""
    calls = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _first_json(arguments)
        if not isinstance(arguments, dict):
            return None
        written = json.dumps(arguments, ensure_ascii=False)
        function = {"name": whole_characters(value["name"]), "arguments": whole_characters(written)}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
    return calls or None


FORMS = (
    ToolForm("hermes", "<tool_call>", _parse_hermes),
    ToolForm("mistral", "[TOOL_CALLS]", _parse_mistral),
    ToolForm("json", '{"name":', _parse_plain_json),
    ToolForm("json", '{"name" :', _parse_plain_json),
)


class ToolText:
    """Separates calls from the text of an answer while the model writes it: text from the first opening on is held back."""

    def __init__(self, form: ToolForm):
        self._form = form
        self._pending = ""
        """Text that is held back: calls, or what may be the beginning of an opening."""
        self._is_call = False

    def push(self, text: str) -> str:
        """Add `text` and return what can be shown now."""
        self._pending += text
        if self._is_call:
            return ""
        opening = self._form.opening
        at = self._pending.find(opening)
        if at >= 0:
            self._is_call = True
        else:
            longest = min(len(opening) - 1, len(self._pending))
            begun = next((size for size in range(longest, 0, -1) if self._pending.endswith(opening[:size])), 0)
            at = len(self._pending) - begun
        visible, self._pending = self._pending[:at], self._pending[at:]
        return visible

    def finish(self) -> tuple[str, list[Call]]:
        """Return the remaining text, and the calls. Text that does not parse as calls is returned as text."""
        calls = self._form.parse(self._pending) if self._is_call else None
        return ("", calls) if calls else (self._pending, [])

    @property
    def unread(self) -> str:
        """The text from the first opening on, not yet parsed; empty without one."""
        return self._pending if self._is_call else ""
