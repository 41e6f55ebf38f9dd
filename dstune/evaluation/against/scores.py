"""Compares the tokens and log-probabilities of two models on prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstune.core.api_client import ApiClient
from dstune.core.errors import DstuneError, Problem, UserError
from dstune.inference.bounds import BOUNDS
from dstune.inference.prompts import Request, read_file
from dstune.inference.reference import CONVERSATIONS
from dstune.inference.reference_rows import MOST_TOKENS

ALLOWED = BOUNDS | {
    "fp8": 0.2,
    "8 bits": 0.15,
    "6 bits": 0.2,
    "5 bits": 0.3,
    "4 bits": 0.5,
    "3 bits": 1.0,
    "2 bits": 2.0,
}
"""Allowed differences by precision: `BOUNDS`, and means over a row for weights of fewer bits. The latter were chosen, not
measured."""

ANSWER_TOKENS = 16
"""Length of a server's own answers."""


@dataclass(frozen=True)
class Row:
    """A prompt as a model reads it."""

    where: str
    messages: list[dict[str, Any]] | None
    text: str
    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] | None = None


def read_rows(prompts: Path | None) -> list[Row]:
    """Return the user's prompts, or conversations that come with dstune. Raises UserError."""
    if prompts is None:
        rows = []
        for system, question, answer in CONVERSATIONS:
            turns = [("system", system)] if system else []
            turns += [("user", question), ("assistant", answer)]
            rows.append(Row("", [{"role": role, "content": text} for role, text in turns], f"{question}\n{answer}"))
        return rows
    return [_row_of(request) for request in read_file(prompts, "--prompts")]


def _row_of(request: Request) -> Row:
    if request.images:
        raise UserError(Problem(request.where, "has images, which are not compared", "prompts of text alone"))
    messages = request.messages or [{"role": "user", "content": request.text}]
    return Row(request.where, messages, request.text, request.tools, request.arguments)


def prompt_ids(tokenizer: Any, row: Row) -> list[int] | None:
    """Return the tokens of a prompt, at most `MOST_TOKENS`; None if the template renders no such conversation."""
    if not tokenizer.chat_template or row.messages is None:
        ids: list[int] = tokenizer(row.text)["input_ids"]
        return ids[:MOST_TOKENS]
    ends_with_answer = row.messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            row.messages,
            tokenize=False,
            tools=row.tools,
            add_generation_prompt=not ends_with_answer,
            **(row.arguments or {}),
        )
    except Exception:  # templates of others raise anything; some take no system text
        return None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:MOST_TOKENS]


def logprobs(module: Any, ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each token but the first."""
    with torch.inference_mode():
        logits = module(input_ids=torch.tensor([list(ids)], device=module.device), use_cache=False).logits[0, :-1]
        values = logits.float().log_softmax(-1).gather(1, torch.tensor(list(ids[1:]), device=logits.device)[:, None])
    return list(values[:, 0].tolist())


class NoPromptLogprobs(Exception):
    """The server does not report the log-probabilities of prompts."""


@dataclass(frozen=True)
class Answer:
    """A server's own answer to a conversation, drawn at temperature 0."""

    tokens: list[str]
    """The text of each token."""
    logprobs: list[float]
    prompt_tokens: int | None
    """The number of tokens that the server made of the prompt."""


class Server:
    """An OpenAI-compatible server. vLLM's reports the log-probabilities of prompts; the others those of their own answers."""

    def __init__(self, client: ApiClient, root: ApiClient, name: str):
        """client: of its `/v1`. root: of the address above it, where vLLM has `/tokenize`."""
        self._client, self._root, self._name = client, root, name

    def prompt_ids(self, row: Row) -> list[int] | None:
        """Return the tokens that the server makes of a conversation; None if it does not show them."""
        if row.messages is None or row.messages[-1]["role"] == "assistant":
            return None
        body = {"model": self._name, "messages": row.messages, "add_generation_prompt": True}
        if row.tools:
            body["tools"] = row.tools
        try:
            answer = self._root.post("/tokenize", body)
        except DstuneError:
            return None
        ids = answer.get("tokens")
        return [int(token) for token in ids] if isinstance(ids, list) else None

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token but the first. Raises NoPromptLogprobs."""
        body = {"model": self._name, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        try:
            entries = self._client.post("/completions", body)["choices"][0]["prompt_logprobs"]
            return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], ids[1:], strict=True)]
        except (UserError, KeyError, TypeError, ValueError, IndexError):
            raise NoPromptLogprobs from None

    def answer(self, row: Row) -> Answer:
        """Return the server's answer to a conversation, with the log-probability of each token. Raises UserError."""
        messages = list(row.messages or [])
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        body = {
            "model": self._name,
            "messages": messages,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "logprobs": True,
        }
        answer = self._client.post("/chat/completions", body)
        try:
            choice = answer["choices"][0]
            tokens = choice["logprobs"]["content"]
            count = (answer.get("usage") or {}).get("prompt_tokens")
            logprobs = [float(token["logprob"]) for token in tokens]
            return Answer(
                [str(token["token"]) for token in tokens], logprobs, count if isinstance(count, int) else None
            )
        except (KeyError, TypeError, ValueError, IndexError):
            address = self._client.address
            fix = "a server that answers `logprobs` of chat completions, as dstune's, vLLM's and llama.cpp's do"
            raise UserError(
                Problem(address.flag, "the server reports no log-probabilities", fix, address.url)
            ) from None


def ids_by_text(tokenizer: Any) -> dict[str, int]:
    """Return the number of each token by its text; tokens that share a text, as parts of characters do, are left out."""
    ids: dict[str, int] = {}
    ambiguous = set()
    for text, token in zip(
        tokenizer.batch_decode([[token] for token in range(len(tokenizer))]), range(len(tokenizer)), strict=True
    ):
        if ids.setdefault(text, token) != token:
            ambiguous.add(text)
    return {text: token for text, token in ids.items() if text not in ambiguous}


def readable_ids(tokens: Sequence[str], ids: dict[str, int]) -> list[int]:
    """Return the numbers of the first tokens, up to one whose text names no single token."""
    known = [ids.get(token) for token in tokens]
    end = known.index(None) if None in known else len(known)
    return [token for token in known[:end] if token is not None]
