"""What requests of the local engine ask, in tokens: conversations with their images, and texts that are continued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dstune.core.errors import UserError
from dstune.data.chat.template import RenderError
from dstune.data.control import TooManyTokens
from dstune.data.images.places import COLUMN, with_images
from dstune.data.images.request import PromptImages
from dstune.data.messages import conversation_of
from dstune.data.problems import RowError
from dstune.serve.engines.local.model import LocalModel
from dstune.serve.errors import ApiError


@dataclass(frozen=True)
class Asked:
    """A conversation as training reads it, and what its places for images show."""

    messages: list[dict[str, Any]]
    images: PromptImages | None = None


def read_messages(model: LocalModel, name: str, messages: Any) -> Asked:
    """Read messages as clients write them. Raises ApiError where they are none, or show images to a model that sees none."""
    with refusing_messages():
        conversation = conversation_of(messages, "messages")
        row = with_images({"messages": conversation}, None, sees="")
        if not row.get(COLUMN):
            return Asked(conversation)
        return Asked(row["messages"], PromptImages(model.image_processor(name), row[COLUMN]))


def chat_prompt(
    model: LocalModel, name: str, asked: Asked, tools: Any, arguments: Mapping[str, Any] | None
) -> list[int]:
    """Return the prompt's tokens of a conversation whose images were measured. Raises ApiError where the template refuses it."""
    place = None if asked.images is None else asked.images.place
    with refusing_messages():
        return model.conversation_ids(name, asked.messages, tools, arguments or {}, place)


@contextmanager
def refusing_messages() -> Iterator[None]:
    """Turn what is wrong with the messages of a request into an ApiError, which is raised."""
    try:
        yield
    except TooManyTokens as error:
        raise too_long(error.most, f"more than {error.most}", 1, "messages") from None
    except (RowError, RenderError) as error:
        raise ApiError(400, f"Invalid messages: {error}.", param="messages", code="invalid_value") from None
    except UserError as error:  # what this machine, or the model's folder, lacks to read images
        reason = error.problems[0].reason
        raise ApiError(400, f"Invalid messages: {reason}.", param="messages", code="unsupported_value") from None


def prompts_of(prompt: Any) -> list[Any]:
    """Return each prompt of a completion request: text or token ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


def text_ids(model: LocalModel, name: str, text: str) -> list[int]:
    """Return the tokens of a text that is continued. Raises ApiError where they are too many."""
    try:
        return model.text_ids(name, text)
    except TooManyTokens as error:
        raise too_long(error.most, f"more than {error.most}", 1, "prompt") from None


def busy() -> ApiError:
    """Return the error about a queue, or a memory, that is full."""
    return ApiError(503, "The engine is busy.", code="overloaded", headers={"retry-after": "1"})


def too_long(limit: int, length: str, requested: int, param: str) -> ApiError:
    """Return the error about a prompt for which the context has no room."""
    reason = f"This model takes {limit} tokens, prompt and answer together; the prompt has {length} and {requested} are asked for."
    return ApiError(400, reason, param=param, code="context_length_exceeded")
