"""Reads and validates the lines of a batch's input file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core.parsing import lines_within, parse_json
from dstune.finetuning.rows import LINE_BYTES

MOST_LINES = 50_000
MOST_ERRORS = 100


@dataclass(frozen=True)
class Line:
    number: int
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True)
class LineError:
    line: int | None
    code: str
    message: str
    param: str | None = None

    def described(self) -> dict[str, Any]:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


def check_lines(path: Path, endpoint: str) -> tuple[int, list[LineError]]:
    """Return the number of requests in a file, and its errors."""
    count, errors, custom_ids = 0, [], set()
    for line in read_lines(path, endpoint):
        count += 1
        if isinstance(line, Line):
            if line.custom_id in custom_ids:
                line = LineError(line.number, "duplicate_custom_id", "Another request has this custom_id.", "custom_id")
            else:
                custom_ids.add(line.custom_id)
        if isinstance(line, LineError):
            errors.append(line)
            if len(errors) >= MOST_ERRORS:
                break
        if count > MOST_LINES:
            return count, [LineError(None, "too_many_requests", f"A batch has at most {MOST_LINES} requests.")]
    if not count:
        errors.append(LineError(None, "empty_file", "The file has no request."))
    return count, errors


def read_lines(path: Path, endpoint: str) -> Iterator[Line | LineError]:
    with path.open("rb") as file:
        for number, (text, _) in enumerate(lines_within(file, LINE_BYTES), start=1):
            if text is None:
                yield LineError(number, "invalid_json_line", f"This line has more than {LINE_BYTES:,} bytes.")
            elif text.strip():
                yield _line(number, text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text, endpoint)


def _line(number: int, text: bytes, endpoint: str) -> Line | LineError:
    try:
        value = parse_json(text.decode())
    except ValueError:
        return LineError(number, "invalid_json_line", "This line is not valid JSON.")
    if not isinstance(value, dict):
        return LineError(number, "invalid_json_line", "This line is no JSON object.")
    for name, fault in _faults(value, endpoint):
        return LineError(number, "invalid_request", fault, name)
    return Line(number, value["custom_id"], value["body"])


def _faults(value: Mapping[str, Any], endpoint: str) -> Iterator[tuple[str, str]]:
    if unknown := sorted(set(value) - {"custom_id", "method", "url", "body"}):
        yield unknown[0][:80], f"Unknown field: {unknown[0][:80]!r}."
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        yield "custom_id", "custom_id must be a text of 1 to 512 characters."
    if value.get("method") != "POST":
        yield "method", "method must be POST."
    if value.get("url") != endpoint:
        yield "url", f"url must be the batch's endpoint, {endpoint}."
    body = value.get("body")
    if not isinstance(body, dict):
        yield "body", "body must be an object."
    elif body.get("stream"):
        yield "body.stream", "A request of a batch cannot stream."


class Answers:
    """The answers of a batch so far, in a file that is appended to. A line that a crash left incomplete is removed."""

    def __init__(self, path: Path):
        self.path = path
        self.ids: set[str] = set()
        if not path.is_file():
            return
        with path.open("r+b") as file:  # line by line: the answers so far may take gigabytes
            end = 0
            while (line := file.readline()).endswith(b"\n"):
                end += len(line)
                self.ids.add(json.loads(line)["custom_id"])
            file.truncate(end)

    def add(self, answer: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self.ids.add(answer["custom_id"])
