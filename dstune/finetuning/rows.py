"""Validates training files row by row, and converts them to dstune's form.

A row must have the shape that OpenAI documents, key by key, and dstune's reader must accept it. Every refusal is a problem with its
line and field.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstune.core.parsing import parse_json
from dstune.core.text import visible
from dstune.data import media
from dstune.data.images.places import COLUMN, with_images
from dstune.data.message import type_of_part
from dstune.data.messages import conversation_of, conversation_row
from dstune.data.preferences import pair_row
from dstune.data.problems import RowError, format_value
from dstune.finetuning.row_images import ImageRows
from dstune.finetuning.row_problems import FieldError, RowProblem
from dstune.serve.gateway.json_bounds import excess_of
from dstune.serve.images import is_chat_image

LEAST_ROWS = 10
LINE_BYTES = 144 << 20
"""Ten images of 10 MB in base64, and text."""
UNCOUNTED_BYTES = 16 << 20
"""Longer lines have their objects and lists counted before they are parsed."""
MOST_DEEP = 64
MOST_PROBLEMS = 20
"""Reading stops after this many problems."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call", "refusal")
TOOL_KEYS = ("tools", "parallel_tool_calls", "functions")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_NUMBER = re.compile(r"\bmessage (\d+)\b")


@dataclass
class Checked:
    """The result of validating a file."""

    rows: int = 0
    bytes: int = 0
    problems: list[RowProblem] = field(default_factory=list)

    def error(self, file: str, param: str) -> dict[str, Any] | None:
        """Return the `error` of a job; None if the file is valid. file: its id; param: `training_file` or `validation_file`."""
        if not self.problems:
            return None
        first = self.problems[0]
        if first.line == 0:
            return {"code": "invalid_n_examples", "message": first.reason, "param": param}
        message = "; ".join(str(problem) for problem in self.problems[:5])
        further = len(self.problems) - 5
        message += f"; and {further} more" if further > 0 else ""
        return {"code": f"invalid_{param}", "message": f"Invalid file {file}: {message}", "param": param}


def check_file(
    path: Path, method: str, *, least: int = LEAST_ROWS, title: str = "Training", blind: str = ""
) -> Checked:
    """Validate a file. method: `supervised`, `dpo` or `reinforcement`; title: the file's name in the message about too few rows.
    blind: why the model reads no images; empty if it does."""
    checked = Checked()
    for _, problem in _read(path, method, checked, ImageRows(blind)):
        if problem is not None:
            checked.problems.append(problem)
            if len(checked.problems) >= MOST_PROBLEMS:
                break
        else:
            checked.rows += 1
    if not checked.problems and checked.rows < least:
        reason = f"{title} file has {checked.rows} example(s), but must have at least {least} examples"
        checked.problems.append(RowProblem(0, "", reason))
    return checked


def write_rows(path: Path, target: Path, method: str) -> int:
    """Write the rows of a valid file in dstune's form, one per line so that line numbers stay, and return their number. Raises
    ValueError if the file is invalid."""
    count = 0
    with target.open("w", encoding="utf-8", newline="\n") as written:
        for row, problem in _read(path, method, Checked()):
            if problem is not None:
                raise ValueError(str(problem))
            written.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _read(
    path: Path, method: str, checked: Checked, images: ImageRows | None = None
) -> Iterator[tuple[dict[str, Any], RowProblem | None]]:
    """Yield the rows of a file in dstune's form, each with its problem, if any. images: validates the rows' images; None if that
    has been done."""
    shape = _SHAPES[method]
    blank = 0
    for number, line in enumerate(_lines(path), start=1):
        checked.bytes += len(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            yield {}, RowProblem(blank, "", "the line is empty")
            blank = 0
        try:
            row = _object(line)
            if images is not None:
                images.judge(row)
            yield shape(row), None
        except FieldError as error:
            yield {}, RowProblem(number, error.name, visible(str(error)))
        except RowError as error:
            yield {}, RowProblem(number, _field_of(str(error)), visible(str(error)))


def _lines(path: Path) -> Iterator[bytes]:
    """Yield lines. One that is too long is truncated, and so is invalid JSON."""
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES + 1):
            if len(line) > LINE_BYTES and not line.endswith(b"\n"):
                while (line_end := file.readline(LINE_BYTES)) and not line_end.endswith(b"\n"):
                    pass
                yield b"\0"
            else:
                yield line


def _object(line: bytes) -> dict[str, Any]:
    if line == b"\0":
        raise FieldError("", f"the line has more than {LINE_BYTES} bytes")
    if len(line) > UNCOUNTED_BYTES and (excess := excess_of(line, MOST_DEEP)):
        raise FieldError("", f"the line has more than {UNCOUNTED_BYTES} bytes and {excess}")
    try:
        value = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise FieldError("", f"is not UTF-8, at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise FieldError("", f"is not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise FieldError("", f"cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise FieldError("", f"must be a JSON object, it is {format_value(value)}")
    if _HALF.search(line):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FieldError("", "holds half of a character (a lone surrogate), which is no text") from None
    return value


# -- shapes of rows


def _supervised(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in row and {"prompt", "completion"} & row.keys():
        _only(row, ("prompt", "completion"), "")
        for name in ("prompt", "completion"):
            value = _required(row, name)
            if not isinstance(value, str) or not value.strip():
                raise FieldError(name, f"must be a text that is not empty, it is {format_value(value)}")
        media.refuse_markers(row)
        return row
    _only(row, ("messages", *TOOL_KEYS), "")
    messages = _messages(_required(row, "messages"), "messages", sees=True)
    _check_calls(messages, _tools(row, ""), "messages")
    _check_by_reader(row)
    return row


def _check_by_reader(row: Mapping[str, Any]) -> None:
    fields = {name: row[name] for name in ("tools", "parallel_tool_calls") if name in row}
    if row.get("functions"):
        fields["tools"] = row["functions"]
    read = conversation_row(conversation_of(row["messages"], "messages"), fields, needs_answer=True)
    if not any(_says(message) for message in read["messages"]):
        raise FieldError("messages", "no message says anything")
    if COLUMN not in with_images(read, None, sees=""):
        media.refuse_markers(read)


def _says(message: Mapping[str, Any]) -> bool:
    return bool(str(message.get("content") or "").strip()) or bool(message.get("tool_calls"))


def _dpo(row: dict[str, Any]) -> dict[str, Any]:
    _only(row, ("input", "preferred_output", "non_preferred_output"), "")
    input_value = _required(row, "input")
    if not isinstance(input_value, dict):
        raise FieldError("input", f"must be an object with messages, it is {format_value(input_value)}")
    _only(input_value, ("messages", "tools", "parallel_tool_calls"), "input.")
    messages = _messages(_required(input_value, "messages", "input."), "input.messages")
    tools = _tools(input_value, "input.")
    _check_calls(messages, tools, "input.messages")
    if messages[-1]["role"] == "assistant":
        raise FieldError(
            f"input.messages[{len(messages) - 1}].role", "the outputs answer it, so it is not the assistant's"
        )
    answers = {}
    for name in ("preferred_output", "non_preferred_output"):
        output = _messages(_required(row, name), name)
        if len(output) != 1 or output[0]["role"] != "assistant":
            raise FieldError(name, "must be one message of the assistant")
        _check_calls(output, tools, name)
        if input_value.get("parallel_tool_calls") is False and len(output[0].get("tool_calls") or ()) > 1:
            raise FieldError(f"{name}[0].tool_calls", "has several calls, and parallel_tool_calls is false")
        answers[name] = output
    preference_row: dict[str, Any] = {
        "prompt": messages,
        "chosen": answers["preferred_output"],
        "rejected": answers["non_preferred_output"],
    }
    if input_value.get("tools"):
        preference_row["tools"] = input_value["tools"]
    media.refuse_markers(pair_row(preference_row))
    return preference_row


def _reinforcement(row: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation that ends with a user message, and the columns that the grader reads as `item.KEY`."""
    messages = _messages(_required(row, "messages"), "messages")
    _check_calls(messages, _tools(row, ""), "messages")
    if messages[-1]["role"] != "user":
        raise FieldError(f"messages[{len(messages) - 1}].role", "the last message must be the user's")
    for name in RESERVED:
        if name in row:
            raise FieldError(name, "this name is taken here; give the field another one")
    media.refuse_markers(
        conversation_row(conversation_of(messages, "messages"), {"tools": row.get("tools")}, needs_answer=False)
    )
    columns = {name: value for name, value in row.items() if name not in ("messages", *TOOL_KEYS)}
    media.refuse_columns(columns)
    prompt_row: dict[str, Any] = {"prompt": messages, **columns}
    if row.get("tools"):
        prompt_row["tools"] = row["tools"]
    return prompt_row


RESERVED = ("prompt", "system", "columns", "chat_template_kwargs")
"""Columns that dstune would interpret in a row of prompts."""
_SHAPES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "supervised": _supervised,
    "dpo": _dpo,
    "reinforcement": _reinforcement,
}


def _required(row: Mapping[str, Any], name: str, prefix: str = "") -> Any:
    if name not in row:
        raise FieldError(f"{prefix}{name}", "is missing")
    return row[name]


def _only(row: Mapping[str, Any], keys: Collection[str], prefix: str) -> None:
    if unknown := [name for name in row if name not in keys]:
        raise FieldError(f"{prefix}{unknown[0][:60]}", f"is no key of this kind of row; known are {', '.join(keys)}")


def _messages(value: Any, name: str, *, sees: bool = False) -> list[dict[str, Any]]:
    """sees: whether the messages may contain images."""
    if not isinstance(value, list) or not value:
        raise FieldError(name, f"must be a list of messages that is not empty, it is {format_value(value)}")
    for number, message in enumerate(value):
        at = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise FieldError(at, f"must be an object with role and content, it is {format_value(message)}")
        _only(message, MESSAGE_KEYS, f"{at}.")
        role = _required(message, "role", f"{at}.")
        if role not in ROLES:
            raise FieldError(f"{at}.role", f"must be one of {', '.join(ROLES)}, it is {format_value(role)}")
        _message(message, at, sees=sees)
    return value


def _message(message: Mapping[str, Any], at: str, *, sees: bool) -> None:
    role = message["role"]
    called = message.get("tool_calls") or message.get("function_call") or message.get("refusal")
    if message.get("content") is None and not (role == "assistant" and called):
        raise FieldError(f"{at}.content", "is missing" if "content" not in message else "must be text, it is null")
    if not isinstance(message.get("content", ""), str | list | None):
        raise FieldError(f"{at}.content", f"must be text, it is {format_value(message['content'])}")
    for number, part in enumerate(content if isinstance(content := message.get("content"), list) else ()):
        of_media = media.PARTS.get(type_of_part(part))
        if of_media and not (sees and is_chat_image(part)):
            raise FieldError(f"{at}.content[{number}]", f"holds {of_media}; {_TEXT_AND_IMAGES if sees else _TEXT_ONLY}")
    weight = message.get("weight")
    if weight is not None:
        if role != "assistant":
            raise FieldError(f"{at}.weight", "only messages of the assistant have one")
        if isinstance(weight, bool) or weight not in (0, 1):
            raise FieldError(f"{at}.weight", f"must be 0 or 1, it is {format_value(weight)}")
    if role != "assistant":
        for key in ("tool_calls", "function_call", "refusal"):
            if message.get(key) is not None:
                raise FieldError(f"{at}.{key}", "only messages of the assistant have it")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise FieldError(f"{at}.tool_call_id", "must name the call that is answered")
    for key in ("name", "refusal"):
        if not isinstance(message.get(key, ""), str | None):
            raise FieldError(f"{at}.{key}", f"must be text, it is {format_value(message[key])}")
    if not isinstance(message.get("tool_calls", []), list | None):
        raise FieldError(f"{at}.tool_calls", f"must be a list, it is {format_value(message['tool_calls'])}")


_TEXT_AND_IMAGES = "jobs train on text and on images as parts of the type image_url"
_TEXT_ONLY = "jobs of this method train on text alone"


def _tools(row: Mapping[str, Any], prefix: str) -> frozenset[str]:
    """Return the names of a row's tools."""
    if row.get("tools") and row.get("functions"):
        raise FieldError(f"{prefix}functions", "stands beside tools, which say the same")
    names = set()
    for key in ("tools", "functions"):
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, list):
            raise FieldError(f"{prefix}{key}", f"must be a list, it is {format_value(value)}")
        for number, tool in enumerate(value):
            at = f"{prefix}{key}[{number}]"
            function = tool.get("function") if isinstance(tool, dict) and key == "tools" else tool
            if key == "tools" and (not isinstance(tool, dict) or tool.get("type") != "function"):
                raise FieldError(f"{at}.type", "must be 'function'")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
                raise FieldError(f"{at}.function.name" if key == "tools" else f"{at}.name", "must be a text")
            if not isinstance(function.get("parameters", {}), dict | None):
                raise FieldError(f"{at}.function.parameters", "must be a JSON schema, which is an object")
            names.add(function["name"])
    if not isinstance(row.get("parallel_tool_calls", True), bool | None):
        raise FieldError(f"{prefix}parallel_tool_calls", "must be true or false")
    return frozenset(names)


def _check_calls(messages: list[dict[str, Any]], tools: Collection[str], name: str) -> None:
    """Check that calls name tools of the row, and that tool results name calls."""
    called: set[str] = set()
    for number, message in enumerate(messages):
        at = f"{name}[{number}]"
        earlier = message.get("function_call")
        called_by = earlier.get("name") if isinstance(earlier, dict) else None
        if isinstance(earlier, dict) and not (isinstance(called_by, str) and called_by in tools):
            raise FieldError(f"{at}.function_call.name", f"{called_by!r:.60} is not among the functions of the row")
        for index, call in enumerate(message.get("tool_calls") or ()):
            place = f"{at}.tool_calls[{index}]"
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise FieldError(f"{place}.function.name", "must be a text")
            if function["name"] not in tools:
                raise FieldError(
                    f"{place}.function.name", f"{function['name']!r:.60} is not among the tools of the row"
                )
            if not isinstance(function.get("arguments"), str):
                raise FieldError(f"{place}.function.arguments", "must be JSON as a text")
            if isinstance(call.get("id"), str):
                called.add(call["id"])
        if message["role"] == "tool" and message["tool_call_id"] not in called:
            raise FieldError(f"{at}.tool_call_id", "no call before it has this id")


def _field_of(reason: str) -> str:
    """Return the field in a message of dstune's reader, which counts messages from 1."""
    number = _NUMBER.search(reason)
    return f"messages[{int(number[1]) - 1}]" if number else ""
