"""Reads prompts and conversations from the command line, a file, or standard input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json

Messages = list[dict[str, Any]]
TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Request:
    """A prompt: a conversation or, if `messages` is None, a text that is continued (by a chat model: its first message)."""

    text: str
    where: str
    """Its name in error messages: `--prompt 1`, `prompts.jsonl:7`."""
    messages: Messages | None = None
    adapter: str | None = None
    """Name of the adapter that answers; None leaves the choice to the command."""
    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] | None = None
    """Extra arguments of the chat template (`chat_template_kwargs`)."""
    images: tuple[str | bytes, ...] = ()
    """The images at the placeholders in `messages`, in order: paths, data URLs or bytes."""
    root: Path | None = None
    """The folder that relative image paths start from; no path may leave it."""


def read_file(path: Path, key: str = "--input") -> list[Request]:
    """Return the prompts of a file, one for each line that is not blank.

    A line is a text or, in a `.jsonl` file, a row with `prompt` or `messages` (and `adapter`, `tools`, `chat_template_kwargs`).
    Raises UserError with every bad line.
    """
    try:
        # Only a line feed ends a line: Python's splitlines would also split a text at U+2028, for example.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise UserError(Problem(key, f"cannot be read: {reason}", value=str(path))) from error
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(Problem(key, "there are no prompts in it", value=str(path)))
    if path.suffix in TABLES:
        fix = 'a .jsonl file of {"prompt": "..."}, or a .txt file with a prompt on each line'
        raise UserError(Problem(key, "a table does not say which column is the prompt", fix, str(path)))
    if path.suffix not in (".jsonl", ".json"):
        return [Request(line, where) for where, line in numbered]
    requests, problems = [], []
    for where, line in numbered:
        try:
            requests.append(_from_row(line, where, path.parent))
        except ValueError as error:
            problems.append(Problem(where, str(error), 'write {"prompt": "..."} or {"messages": [...]}'))
    if problems:
        raise UserError(problems)
    return requests


def _from_row(line: str, where: str, root: Path) -> Request:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    prompt, messages, adapter = row.get("prompt"), row.get("messages"), row.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise ValueError("has an `adapter` that is no name")
    options = {"adapter": adapter, **_template_options(row)}
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("has an empty `prompt`")
        return Request(prompt, where, **options)
    if not isinstance(messages, list) or not messages:
        raise ValueError("has neither a `prompt` nor `messages`")
    column = row.get("images", row.get("image"))
    return request_of(messages, where, column=column, root=root, **options)


def request_of(messages: Any, where: str, *, column: Any = None, **options: Any) -> Request:
    """Return the request that a conversation makes; the messages are read as in a training file.

    column: images for the placeholders. options: further fields of the request. Raises ValueError.
    """
    from dstune.data.images.places import COLUMN, with_images
    from dstune.data.message import content_text
    from dstune.data.messages import conversation_of

    conversation = conversation_of(messages, "messages")
    last_message = conversation[-1]
    if last_message["role"] == "assistant":
        raise ValueError("ends with the assistant's message, so there is nothing to answer")
    row = with_images({"messages": conversation}, column, sees="")
    images = tuple(row.get(COLUMN, ()))
    return Request(content_text(last_message.get("content")), where, row["messages"], images=images, **options)


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the chat template gets besides the messages. Raises ValueError."""
    from dstune.data.messages import template_arguments, tools_of

    tools = row.get("tools", row.get("functions"))
    return {
        "tools": tools_of(tools) if tools else None,
        "arguments": template_arguments(row.get("chat_template_kwargs")) or None,
    }


def with_system(request: Request, system: str | None) -> Request:
    """Return `request` as a conversation that begins with the system message `system`, unless it has one already."""
    messages = request.messages or [{"role": "user", "content": request.text}]
    if not system or messages[0]["role"] == "system":
        return request
    return replace(request, messages=[{"role": "system", "content": system}, *messages])


def check_adapters(requests: Sequence[Request], names: Sequence[str]) -> None:
    """Check that `names` has the adapter of every request. Raises UserError with every row that names another one."""
    unknown = [request for request in requests if request.adapter is not None and request.adapter not in names]
    if unknown:
        adapter_names = f"the adapters are {', '.join(names)}" if names else "give --adapter NAME=PATH"
        raise UserError(
            Problem(r.where, "there is no adapter of this name", adapter_names, str(r.adapter)) for r in unknown
        )
