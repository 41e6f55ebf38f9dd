"""The prompts of rows, as a model is asked them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.recording.folder import Folder, digest_of_user, users_in

PASSED_ON = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "response_format")
"""What a row sets beside its messages for the request."""
NOT_SENT = ("weight",)
"""Fields of messages that only training reads."""
QUESTIONS = ("prompt", "text", "source")
"""Columns of a row without messages that hold what is asked; the first one that it has counts."""
ANSWERS = ("completion", "target", "label", "chosen", "preferred_output")
"""Columns that hold the answer of a row whose messages do not end with it."""
CHARACTERS_PER_TOKEN = 4
"""For the estimate: about right for English."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the answer that its row has."""

    place: str
    messages: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    """What the row sets beside its messages."""
    expected: dict[str, Any] | None = None
    """The answer in the row: its last message if an assistant wrote it, or the text of a column of ANSWERS."""
    users: tuple[str, ...] = ()
    """Digests of the users that the row names."""

    @property
    def key(self) -> str:
        """A digest of what is asked."""
        text = json.dumps([self.messages, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def turns(self) -> tuple[str, ...]:
        """What the user asks, turn by turn, without differences of case and white space."""
        asked = [text_of(message) for message in self.messages if message.get("role") == "user"]
        return tuple(" ".join(text.casefold().split()) for text in asked)

    @property
    def tokens(self) -> int:
        """An estimate from the number of characters."""
        text = json.dumps([self.messages, self.options], ensure_ascii=False)
        return -(-len(text) // CHARACTERS_PER_TOKEN)


def prompt_of(fields: Mapping[str, Any], place: str, user_columns: Sequence[str] = ()) -> Prompt | None:
    """Return the prompt of a row; None if it has none.

    fields: `messages` (of a training row, a log or the `body` of a batch request), the `input` of a preference, or a column of
    QUESTIONS.
    """
    body: Mapping[str, Any] = fields
    for name in ("body", "input"):
        if isinstance(fields.get(name), dict) and "messages" in fields[name]:
            body = fields[name]
    messages = body.get("messages")
    if messages is None:
        text = next((body[name] for name in QUESTIONS if body.get(name) is not None), None)
        messages = [{"role": "user", "content": text}] if isinstance(text, str) and text.strip() else text
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    messages = [{name: value for name, value in each.items() if name not in NOT_SENT} for each in messages]
    expected = messages.pop() if messages and messages[-1].get("role") == "assistant" else _answer_in(fields)
    if not any(message.get("role") == "user" for message in messages):
        return None
    options = {name: body[name] for name in PASSED_ON if body.get(name) is not None}
    users = sorted(map(digest_of_user, users_in(fields, user_columns)))
    return Prompt(place, messages, options, expected, tuple(users))


def _answer_in(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the message with the answer in a column of ANSWERS; None if there is none, or it is marked as a bad one."""
    if fields.get("label") is False:
        return None
    answer = next((fields[name] for name in ANSWERS if fields.get(name) is not None), None)
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        return {name: value for name, value in answer[-1].items() if name not in NOT_SENT}
    if isinstance(answer, str | int) and not isinstance(answer, bool):
        return {"role": "assistant", "content": str(answer)}
    return None


def text_of(message: Any) -> str:
    """Return the text of a message; its tool calls as JSON if it has no text."""
    if not isinstance(message, dict):
        return ""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if content:
        return str(content).strip()
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return json.dumps({"tool_calls": functions}) if functions else ""


def read_prompts(specs: Iterable[str], user_columns: Sequence[str], flag: str = "--prompts") -> list[Prompt]:
    """Return the prompts of files, folders, globs or samples. flag: the option that names them, for messages.

    Raises UserError for invalid rows and rows without a prompt.
    """
    from dstune.data import sources
    from dstune.data.files import place

    prompts: list[Prompt] = []
    for spec in specs:
        for file in sources.expand(spec, flag):
            for row in sources.read(file):
                where = place(file, row.line)
                prompt = None if row.fields is None else prompt_of(row.fields, where, user_columns)
                if prompt is None:
                    reason = f"{where}: {row.error or 'no messages with a question, no prompt and no text'}"
                    raise UserError(Problem(flag, reason, "repair the row, or leave it out", spec))
                prompts.append(prompt)
    return prompts


def recorded_prompts(
    folder: Folder, identifiers: Iterable[str], user_columns: Sequence[str], missing: dict[str, str]
) -> list[Prompt]:
    """Return the prompts of recorded files; say in `missing` which rows have none."""
    from dstune.data import sources
    from dstune.recording.folder import file_name

    prompts: list[Prompt] = []
    for identifier in identifiers:
        record = folder.load(f"files/{file_name(identifier)}.json")
        if record is None:
            continue  # the server did not give the file, which `missing` says
        path = folder.path / "files" / str(record["content"])
        if not path.stat().st_size:
            continue
        for row in sources.read(sources.expand(str(path), "--prompts-of")[0]):
            where = f"{identifier}:{row.line}"
            prompt = None if row.fields is None else prompt_of(row.fields, where, user_columns)
            if prompt is None:
                missing[f"prompts of {identifier}"] = f"row {row.line} has no prompt"
            else:
                prompts.append(prompt)
    return prompts


def without_repeats(prompts: Iterable[Prompt]) -> dict[str, Prompt]:
    """Return the prompts by key: each is asked once."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.key, prompt)
    return unique
