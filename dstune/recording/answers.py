"""Ask models for answers, and write each answer down before it is used."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import quote

from dstune.core import files
from dstune.core.api_client import ApiClient, RequestRefused
from dstune.core.parsing import parse_json
from dstune.recording.folder import Folder, file_name
from dstune.recording.inventory import KEY_REFUSED
from dstune.recording.prompts import Prompt

OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
LEFT_OUT = {"logprobs": ("logprobs", "top_logprobs"), "top_logprobs": ("top_logprobs", "logprobs")}
OPTIONAL = ("temperature", "seed", *LEFT_OUT, *OTHER_NAME)
"""Parameters that some models refuse: they are asked again without, or with the other name."""


@dataclass(frozen=True)
class Asking:
    """How models are asked."""

    temperature: float
    seed: int
    max_tokens: int
    logprobs: int
    """The number of alternatives of each token; -1 for no log-probabilities."""
    deployments: bool = False
    """Whether the model is part of the path, as Azure has it."""

    def body(self, model: str, prompt: Prompt) -> dict[str, Any]:
        body = {
            "model": model,
            "messages": prompt.messages,
            **prompt.options,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_completion_tokens": self.max_tokens,
        }
        if self.logprobs >= 0:
            body |= {"logprobs": True} | ({"top_logprobs": self.logprobs} if self.logprobs else {})
        return body

    def path(self, model: str) -> str:
        return (
            f"/deployments/{quote(model, safe='', errors='replace')}/chat/completions"
            if self.deployments
            else "/chat/completions"
        )


class ModelGone(Exception):
    """The server does not give this model to this key (any more)."""


class Journal:
    """The answers of one model, one on each line."""

    def __init__(self, folder: Folder, model: str):
        self._folder = folder
        path = folder.path / "answers" / f"{file_name(model)}.jsonl"
        self.keys: set[str] = set()
        self.tokens = 0
        self.refusals: list[str] = []
        """Why prompts of this call have no answer."""
        refused = end = 0
        files.append(path, mode=0o600).close()
        with os.fdopen(files.open_plain(path, os.O_RDONLY), "rb") as lines:
            for line in lines:
                record = _record_in(line)
                if record is None:
                    break  # an incomplete line that a killed process left
                end += len(line)
                refused += "error" in record
                if "error" not in record:
                    self._count(record)
        os.truncate(path, end)
        if refused:  # those prompts are asked again
            folder.rewrite(path, lambda line: None if "error" in (_record_in(line) or {}) else line)
        self._stream: IO[bytes] = files.append(path, mode=0o600)

    def _count(self, record: Mapping[str, Any]) -> None:
        self.keys.add(str(record.get("key")))
        self.tokens += _tokens(record)

    def add(self, record: dict[str, Any]) -> None:
        line = json.dumps(self._folder.without_key(record), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        self._stream.write(line)
        self._count(record)
        if "error" in record:
            error = record["error"]
            self.refusals.append(str(error.get("message") if isinstance(error, dict) else error))

    def close(self) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()


def _record_in(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line; None if the line is incomplete or holds none."""
    try:
        record = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _tokens(record: Mapping[str, Any]) -> int:
    usage = record.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else 0


def gone_key(model: str) -> str:
    """Return under which name a model that is gone is listed as missing."""
    return f"answers of {model}"


def ask_all(
    client: ApiClient,
    folder: Folder,
    asking: Asking,
    models: Sequence[str],
    prompts: Mapping[str, Prompt],
    *,
    at_once: int,
    budget_tokens: int | None,
    missing: dict[str, str],
) -> bool:
    """Record the answer of each model to each prompt; return whether the budget sufficed. missing: gets the models that are gone,
    and how many prompts the others refused.

    Raises:
        ServerUnreachable, RequestRefused: as `ApiClient.get`; answers that were under way are recorded.
    """
    journals = {model: Journal(folder, model) for model in models}
    refused = Refusals()
    open_requests = [
        (model, prompt)
        for model in models
        for key, prompt in prompts.items()
        if key not in journals[model].keys and not folder.has_deleted(prompt.users)
    ]
    open_requests.reverse()
    running: dict[Future[dict[str, Any]], str] = {}
    try:
        with ThreadPoolExecutor(at_once) as pool:
            try:
                while open_requests or running:
                    spent = sum(journal.tokens for journal in journals.values())
                    if budget_tokens is not None and spent >= budget_tokens and open_requests:
                        _record_running(running, journals)
                        return False
                    while open_requests and len(running) < at_once:
                        model, prompt = open_requests.pop()
                        running[pool.submit(answer_of, client, folder, asking, model, prompt, refused)] = model
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        model = running.pop(future)
                        try:
                            journals[model].add(future.result())
                        except ModelGone as error:
                            missing[gone_key(model)] = str(error)
                            open_requests = [each for each in open_requests if each[0] != model]
            except BaseException:
                client.close()
                _record_running(running, journals)
                raise
    finally:
        for model, journal in journals.items():
            journal.close()
            if journal.refusals:
                first = journal.refusals[0][:200]
                missing[f"{len(journal.refusals):,} answers of {model}"] = (
                    f"the prompts were refused, the first one: {first}"
                )
    return True


def _record_running(running: dict[Future[dict[str, Any]], str], journals: Mapping[str, Journal]) -> None:
    for future in wait(running).done:
        if future.exception() is None:
            journals[running[future]].add(future.result())
    running.clear()


class Refusals:
    """The parameters that models refuse, which their next requests leave out; threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_model: dict[str, list[str]] = {}

    def apply(self, model: str, body: dict[str, Any]) -> dict[str, Any]:
        body = dict(body)
        with self._lock:
            for parameter in self._by_model.get(model, ()):
                _adapt(body, parameter)
        return body

    def learn(self, model: str, parameter: str) -> None:
        with self._lock:
            names = self._by_model.setdefault(model, [])
            if parameter not in names:
                names.append(parameter)


def _adapt(body: dict[str, Any], parameter: str) -> None:
    value = body.get(parameter)
    for name in LEFT_OUT.get(parameter, (parameter,)):
        body.pop(name, None)
    if parameter in OTHER_NAME and value is not None:
        body[OTHER_NAME[parameter]] = value


def answer_of(
    client: ApiClient, folder: Folder, asking: Asking, model: str, prompt: Prompt, refused: Refusals
) -> dict[str, Any]:
    """Return the record of a model's answer to a prompt, or of the server's refusal to answer it.

    Raises:
        ModelGone: the server does not give this model.
        ServerUnreachable, RequestRefused: as `ApiClient.get`; a refused request only if the key is refused.
    """
    original = asking.body(model, prompt)
    tried: set[str] = set()
    while True:
        body = refused.apply(model, original)
        try:
            answered = client.post(asking.path(model), body)
            return record_of(folder, model, prompt, body, answered)
        except RequestRefused as error:
            parameter = _refused_parameter(error, body)
            if parameter and parameter not in tried:
                tried.add(parameter)
                refused.learn(model, parameter)
                continue
            if error.status == KEY_REFUSED:
                raise
            if error.status in (403, 404):
                raise ModelGone(f"HTTP {error.status} {error.detail}".strip()) from None
            refusal = {"status": error.status, "message": folder.redacted(error.detail)}
            return record_of(folder, model, prompt, body, {"error": refusal})


def _refused_parameter(error: RequestRefused, body: Mapping[str, Any]) -> str:
    """Return the parameter that the server does not take and that may be left out; empty if there is none."""
    if error.status not in (400, 422):
        return ""
    if error.parameter:
        return error.parameter if error.parameter in OPTIONAL and error.parameter in body else ""
    return next((name for name in sorted(OPTIONAL, key=len, reverse=True) if name in body and name in error.detail), "")


def record_of(
    folder: Folder, model: str, prompt: Prompt, body: Mapping[str, Any], answered: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record of an answer, masked if the recording is. answered: a chat completion, or an `error`."""
    choices = answered.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    record: dict[str, Any] = {
        "key": prompt.key,
        "model": model,
        "place": prompt.place,
        "users": list(prompt.users),
        "messages": folder.redacted(prompt.messages),
        "options": folder.redacted(prompt.options),
        "expected": folder.redacted(prompt.expected),
        "parameters": {name: body[name] for name in OPTIONAL if name in body},
        "recorded_at": int(time.time()),
    }
    if choice is None or not isinstance(choice.get("message"), dict):
        return {**record, "error": answered.get("error") or {"message": "the answer has no choices[0].message"}}
    answer = folder.redacted(choice["message"])
    logprobs = choice.get("logprobs")
    if answer != choice["message"]:
        logprobs = _without_tokens(logprobs)
    return {
        **record,
        "answer": answer,
        "finish_reason": choice.get("finish_reason"),
        "logprobs": logprobs,
        "usage": answered.get("usage"),
        "served_by": answered.get("model"),
        "system_fingerprint": answered.get("system_fingerprint"),
    }


def _without_tokens(logprobs: Any) -> Any:
    """Return log-probabilities without the tokens, which spell what was masked in the answer."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return None
    return {"content": [{"logprob": item.get("logprob")} for item in content if isinstance(item, dict)]}
