"""Tool calls in what a model writes, in the form that its chat template shows calls to it."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
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
    """How calls are written. opening: text with which a call begins."""

    name: str
    opening: str
    parse: Callable[[str], list[Call] | None]
    """The calls of an answer's text from the opening on; None where it holds none that can be read."""


def form_of(template: ChatTemplate) -> ToolForm | None:
    """Return the form of the calls that the template renders; None where it shows neither tools nor calls, or in no known form."""
    user = {"role": "user", "content": "q"}
    calls = [{"type": "function", "id": "123456789", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}]
    try:
        reported = template.text([user], tools=[_TOOL], prompt=True)
        text_before = template.text([user])
        both = template.text([user, {"role": "assistant", "content": "", "tool_calls": calls}])
    except RenderError:
        return None
    written = both[len(text_before) :] if both.startswith(text_before) else both
    if _NAME not in reported or _NAME not in written:
        return None
    return next((form for form in FORMS if form.opening in written and form.parse(_part(written, form))), None)


def _part(text: str, form: ToolForm) -> str:
    return text[text.index(form.opening) :]


def _hermes(text: str) -> list[Call] | None:
    bodies = re.findall(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", text, re.S)
    return _all(_json(body) for body in bodies)


def _mistral(text: str) -> list[Call] | None:
    value = _json(text.partition("[TOOL_CALLS]")[2])
    return _all(value if isinstance(value, list) else [value])


def _plain_json(text: str) -> list[Call] | None:
    return _all(_json(part) for part in text.split("<|python_tag|>")[-1].split(";"))


def _json(text: str) -> Any:
    try:
        return json.JSONDecoder().raw_decode(text.strip())[0]
    except (ValueError, RecursionError):
        return None


def _all(values: Any) -> list[Call] | None:
    calls = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, dict):
            return None
        written = json.dumps(arguments, ensure_ascii=False)
        function = {"name": whole_characters(value["name"]), "arguments": whole_characters(written)}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
    return calls or None


FORMS = (
    ToolForm("hermes", "<tool_call>", _hermes),
    ToolForm("mistral", "[TOOL_CALLS]", _mistral),
    ToolForm("json", '{"name":', _plain_json),
    ToolForm("json", '{"name" :', _plain_json),
)


class ToolText:
    """Takes calls out of an answer's text while it is written. Text from the first opening on is held back."""

    def __init__(self, form: ToolForm):
        self._form = form
        self._held = ""
        self._calling = False

    def push(self, text: str) -> str:
        """Return what of the text can be shown."""
        self._held += text
        if self._calling:
            return ""
        opening = self._form.opening
        if (at := self._held.find(opening)) >= 0:
            self._calling = True
            visible, self._held = self._held[:at], self._held[at:]
            return visible
        size = next(
            (n for n in range(min(len(opening) - 1, len(self._held)), 0, -1) if self._held.endswith(opening[:n])), 0
        )
        visible, self._held = self._held[: len(self._held) - size], self._held[len(self._held) - size :]
        return visible

    def finish(self) -> tuple[str, list[Call]]:
        """Return the rest of the text, and the calls. What cannot be read as calls is text."""
        calls = self._form.parse(self._held) if self._calling else None
        return ("", calls) if calls else (self._held, [])

    @property
    def unread(self) -> str:
        """The text of what looks like calls."""
        return self._held if self._calling else ""
