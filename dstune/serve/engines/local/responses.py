"""Answers `/v1/responses` in the local engine: read as a conversation, answered in the shape of OpenAI's Responses API.

Nothing is stored, so no request can refer to an earlier answer. The order of a stream's events follows
https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dstune.serve.asgi import event
from dstune.serve.engines.local.answers import ChatAnswers
from dstune.serve.engines.local.model import LocalModel
from dstune.serve.engines.local.prompts import Conversation
from dstune.serve.engines.local.scheduler import Scheduler
from dstune.serve.errors import ApiError
from dstune.serve.images import is_input_image

_SAME = ("model", "stream", "temperature", "top_p")
"""Fields that have the same name in a chat completion."""


def as_chat(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the equivalent body of a chat completion request."""
    request_input, messages = request["input"], []
    if request.get("instructions"):
        messages.append({"role": "system", "content": request["instructions"]})
    if isinstance(request_input, str):
        messages.append({"role": "user", "content": request_input})
    else:
        messages += map(_chat_message, request_input)
    body = {name: request[name] for name in _SAME if name in request} | {"messages": messages}
    return body | ({"max_tokens": request["max_output_tokens"]} if "max_output_tokens" in request else {})


def _chat_message(item: Mapping[str, Any]) -> dict[str, Any]:
    content = item["content"]
    return {"role": item["role"], "content": content if isinstance(content, str) else [*map(_chat_part, content)]}


def _chat_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if is_input_image(part):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return {"type": "text", "text": part["text"]}


@contextmanager
def naming_input() -> Iterator[None]:
    """Rewrite an ApiError about `messages` so that it names the field `input`, from which they were read."""
    try:
        yield
    except ApiError as error:
        if error.param != "messages":
            raise
        words = str(error).replace("Invalid messages", "Invalid input", 1)
        raise ApiError(error.status, words, param="input", code=error.code, headers=error.headers) from None


class ResponseAnswers(ChatAnswers):
    """An answer to a request to `/v1/responses`."""

    def __init__(
        self,
        model: LocalModel,
        scheduler: Scheduler,
        body: Mapping[str, Any],
        conversation: Conversation,
        request: Mapping[str, Any],
    ):
        """body: the request as a chat completion (`as_chat`). Raises ApiError."""
        super().__init__(model, scheduler, body, conversation)
        self.id, self._item = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self._request = request
        self._events = 0

    async def answer(self) -> dict[str, Any]:
        await super().answer()
        return self._response(self._status)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        try:
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))
            yield self._event(
                "response.output_item.added", output_index=0, item=self._message("in_progress") | {"content": []}
            )
            yield self._event("response.content_part.added", **place, part=self._text(""))
            async for _, piece in self.pieces():
                if piece.text:
                    yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        except ApiError as error:
            yield self._event("error", code=error.code, message=str(error), param=error.param)
            return
        finally:
            self.cancel()
        text, status = self.choices[0].text, self._status
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=self._text(text))
        yield self._event("response.output_item.done", output_index=0, item=self._message(status))
        yield self._event(f"response.{status}", response=self._response(status))

    @property
    def _status(self) -> str:
        return "incomplete" if self.choices[0].finish == "length" else "completed"

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return f"event: {kind}\n".encode() + event(value)

    def _response(self, status: str) -> dict[str, Any]:
        begun = status == "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.name,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **{name: self._request.get(name) for name in ("instructions", "max_output_tokens", "temperature", "top_p")},
            "output": [] if begun else [self._message(status)],
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "metadata": {},
            "usage": None if begun else self._usage(),
        }

    def _message(self, status: str) -> dict[str, Any]:
        content = [self._text(self.choices[0].text)]
        return {"type": "message", "id": self._item, "role": "assistant", "status": status, "content": content}

    def _text(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _usage(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
