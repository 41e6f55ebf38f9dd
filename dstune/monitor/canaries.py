"""Asks canaries: prompts with fixed answers, which show whether the server still answers as before.

They do not depend on what clients request.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.core.api_client import Address, ApiClient
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import lines_within, open_file, parse_json

ANSWER_SECONDS = 120.0
MOST_CANARIES = 1000
MOST_LINE_BYTES = 1 << 20
KEY_VARIABLE = "DSTUNE_API_KEY"
ROUTES = ("/v1/chat/completions", "/v1/completions", "/classify")


@dataclass(frozen=True)
class Canary:
    """A request and its expected answer."""

    place: str
    request: dict[str, Any]
    expected: str


@dataclass(frozen=True)
class CanaryResult:
    """The number of canaries asked, and those whose answers changed."""

    count: int
    changed: tuple[str, ...]
    """Places of the changed ones: FILE:LINE."""


def read_canaries(path: Path) -> list[Canary]:
    """Read canaries from a file with a JSON object per line: `messages`, `prompt` or `text`, and `expected`.

    Raises UserError with the first ten invalid rows.
    """
    canaries, problems = [], []
    try:
        with open_file(path) as stream:
            for number, (line, _) in enumerate(lines_within(stream, MOST_LINE_BYTES), 1):
                if line is not None and not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = parse_json(line or b"")
                except ValueError:
                    row = None
                name = next(
                    (name for name in ("messages", "prompt", "text") if isinstance(row, dict) and row.get(name)), None
                )
                if name is None or not isinstance(row.get("expected"), str):
                    reason = "is not a canary: it needs messages, prompt or text, and expected"
                    problems.append(Problem(where, reason, 'for example {"prompt": "...", "expected": "..."}'))
                else:
                    canaries.append(Canary(where, {name: row[name]}, row["expected"]))
    except OSError as error:
        raise UserError(Problem("--canaries", f"cannot be read: {error.strerror}", value=str(path))) from None
    if len(canaries) > MOST_CANARIES:
        problems.append(Problem("--canaries", f"has more than {MOST_CANARIES} rows", value=str(path)))
    if not canaries and not problems:
        problems.append(Problem("--canaries", "has no rows", value=str(path)))
    if problems:
        raise UserError(problems[:10])
    return canaries


def ask_canaries(canaries: list[Canary], server: str, model: str) -> CanaryResult:
    """Send each canary to a server, with greedy decoding, and compare the answers exactly. The key is that of DSTUNE_API_KEY.

    Raises UserError if the server does not answer, which says nothing about the model.
    """
    changed = [canary.place for canary in canaries if _answer(canary, server, model) != canary.expected]
    return CanaryResult(len(canaries), tuple(changed))


def _answer(canary: Canary, server: str, model: str) -> str:
    if "messages" in canary.request:
        body = {"model": model, **canary.request, "temperature": 0, "max_tokens": 256}
        return str(_post(f"{server}/v1/chat/completions", body)["choices"][0]["message"]["content"])
    if "prompt" in canary.request:
        body = {"model": model, **canary.request, "temperature": 0, "max_tokens": 256}
        return str(_post(f"{server}/v1/completions", body)["choices"][0]["text"])
    return str(_post(f"{server}/classify", {"model": model, "input": canary.request["text"]})["data"][0]["label"])


def _post(url: str, body: dict[str, Any]) -> Any:
    client = ApiClient(Address(url, os.environ.get(KEY_VARIABLE, ""), seconds=ANSWER_SECONDS))
    try:
        return parse_json(client.ask_once("", body))
    except urllib.error.HTTPError as error:
        reason = f"the server answers {error.code}"
        fix = f"set {KEY_VARIABLE} to a client's key" if error.code == 401 else "look at the server's log"
        raise UserError(Problem("--server", reason, fix, url)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            Problem("--server", f"does not answer: {error}", "give the address that `dstune serve` prints", url)
        ) from None
