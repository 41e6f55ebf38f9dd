"""Limits how much an engine may read and write for one request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dstune.serve.engines.base import Engine
from dstune.serve.errors import ApiError
from dstune.serve.images import is_image

MOST_ANSWERS = 512
NAMES: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
"""For routes that generate text: the fields that limit an answer's length. The first one is filled in."""
COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`; llama.cpp would never stop."""


CHARACTERS_OF_TOKEN = 128
"""The longest tokens of large vocabularies are runs of this many spaces. A text with more characters than that per token of context
cannot fit, and need not be tokenized."""
TOO_LONG = "context_length_exceeded"
_READ = ("messages", "prompt", "input", "query", "documents", "texts", "text_1", "text_2", "question", "context")


def check_context(path: str, body: Mapping[str, Any], engine: Engine) -> None:
    """Raises ApiError if a prompt cannot fit into the engine's context, however it is tokenized."""
    most = engine.context * CHARACTERS_OF_TOKEN
    for name in _READ if most else ():
        for prompt in _prompts(path, name, body.get(name)):
            if _characters(prompt) > most:
                reason = f"This model takes {engine.context} tokens, prompt and answer together; {name} has more."
                raise ApiError(400, reason, param=name, code=TOO_LONG)


def _prompts(path: str, name: str, value: Any) -> Iterator[Any]:
    """Yield the prompts of a request: a conversation, or each text of a list."""
    if not isinstance(value, list) or path == "/v1/responses":
        yield value
    elif name == "messages":
        yield from value if isinstance(value[0], list) else [value]
    else:
        yield from [value] if isinstance(value[0], int) else value


def _characters(value: Any) -> int:
    """Count the characters of all texts. A token id counts as the longest token; images count as none, since their tokens depend on
    their sizes."""
    if isinstance(value, str):
        return len(value)
    if is_image(value):
        return 0
    if isinstance(value, list | dict):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return CHARACTERS_OF_TOKEN if type(value) is int else 0


def bounded(path: str, body: dict[str, Any], engine: Engine, most: int) -> dict[str, Any]:
    """Return `body` with a limit that lets its answers have at most `most` tokens together. Raises ApiError if it asks for more."""
    names = NAMES.get(path)
    if names is None:
        return body
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    answers = prompts * max(body.get("n", 1), body.get("best_of", 1))
    if answers > MOST_ANSWERS:
        raise ApiError(
            400, f"The request asks for more than {MOST_ANSWERS} answers.", param="n", code="too_many_answers"
        )
    requested = max((body[name] for name in names if name in body), default=0)
    if not requested:
        if path == "/v1/completions":
            requested = COMPLETION_TOKENS
        elif engine.fits_without_max_tokens(answers, most):
            return body
        else:
            requested = max(most // answers, 1)
        body = body | {names[0]: requested}
    if answers * requested > most:
        reason = f"{answers} answers of {requested} tokens are more than the {most} tokens that a request may ask for."
        raise ApiError(400, reason, param=names[0], code="too_many_tokens")
    return body
