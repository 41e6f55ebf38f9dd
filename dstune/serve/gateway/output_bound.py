"""How much of an engine's output one request may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstune.serve.engines.base import Engine
from dstune.serve.errors import ApiError

MOST_ANSWERS = 512
NAMES: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
"""Of routes that write text: the names of an answer's longest length. The first is filled in."""
COMPLETION_TOKENS = 16
"""Of OpenAI's API, where a request to `/v1/completions` does not say; llama.cpp would never stop."""


def bounded(path: str, body: dict[str, Any], engine: Engine, most: int) -> dict[str, Any]:
    """`body`, in which its answers write at most `most` tokens together. Raises ApiError for one that asks for more."""
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
