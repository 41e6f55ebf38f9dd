"""Reads requests of the local engine into tokens: conversations with their images, and texts to be continued."""

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
class Conversation:
    """A conversation in the form of training, with the images at its placeholders."""

    messages: list[dict[str, Any]]
    images: PromptImages | None = None


def read_messages(model: LocalModel, name: str, messages: Any) -> Conversation:
    """Read a request's messages. Raises ApiError if they are invalid, or contain images and the model accepts none."""
    with api_errors_for_messages():
        conversation = conversation_of(messages, "messages")
        row = with_images({"messages": conversation}, None, sees="")
        if not row.get(COLUMN):
            return Conversation(conversation)
        return Conversation(row["messages"], PromptImages(model.image_processor(name), row[COLUMN]))


def chat_prompt(
    model: LocalModel, name: str, conversation: Conversation, tools: Any, arguments: Mapping[str, Any] | None
) -> list[int]:
    """Return the prompt tokens of a conversation whose images have been measured. Raises ApiError if the template refuses it."""
    place = None if conversation.images is None else conversation.images.place
    with api_errors_for_messages():
        return model.conversation_ids(name, conversation.messages, tools, arguments or {}, place)


@contextmanager
def api_errors_for_messages() -> Iterator[None]:
    """Convert errors about the messages of a request into ApiError."""
    try:
        yield
    except TooManyTokens as error:
        raise too_long(error.most, f"more than {error.most}", 1, "messages") from None
    except (RowError, RenderError) as error:
        raise ApiError(400, f"Invalid messages: {error}.", param="messages", code="invalid_value") from None
    except UserError as error:  # this machine, or the model's folder, lacks something needed to read images
        reason = error.problems[0].reason
        raise ApiError(400, f"Invalid messages: {reason}.", param="messages", code="unsupported_value") from None


def split_prompts(prompt: Any) -> list[Any]:
    """Return each prompt of a completion request: text or token ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


def text_ids(model: LocalModel, name: str, text: str) -> list[int]:
    """Return the tokens of a text to be continued. Raises ApiError if there are too many."""
    try:
        return model.text_ids(name, text)
    except TooManyTokens as error:
        raise too_long(error.most, f"more than {error.most}", 1, "prompt") from None


def busy() -> ApiError:
    """Return the error for a full queue or exhausted memory."""
    return ApiError(503, "The engine is busy.", code="overloaded", headers={"retry-after": "1"})


def too_long(limit: int, length: str, requested: int, param: str) -> ApiError:
    """Return the error for a prompt that does not fit into the context."""
    reason = f"This model takes {limit} tokens, prompt and answer together; the prompt has {length} and {requested} are asked for."
    return ApiError(400, reason, param=param, code="context_length_exceeded")
