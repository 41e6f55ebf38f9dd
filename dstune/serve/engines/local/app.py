"""The local engine's HTTP server. Its routes match vLLM's, so that the gateway talks to both in the same way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dstune.core.errors import UserError
from dstune.data.images.request import PromptImages
from dstune.serve.asgi import EVENTS, ClientGone, Receive, Scope, Send, dumps, read_body, respond, while_connected
from dstune.serve.engines.local.answers import Answers, ChatAnswers, TextAnswers
from dstune.serve.engines.local.model import ImageInputs, LocalModel
from dstune.serve.engines.local.prompts import (
    Conversation,
    api_errors_for_messages,
    busy,
    chat_prompt,
    read_messages,
    split_prompts,
    text_ids,
)
from dstune.serve.engines.local.responses import ResponseAnswers, as_chat, naming_input
from dstune.serve.engines.local.scheduler import Scheduler
from dstune.serve.errors import ApiError
from dstune.serve.turns import CLIENT, TurnThreads

MOST_BYTES = 64 << 20
IMAGE_THREADS = 2
"""Images that are decoded at the same time. They are of different clients, so that no client waits for the large images of another
one. Each is in memory as pixels, beside what its decoder takes."""

T = TypeVar("T")
Handler = Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]]


class EngineApp:
    """ASGI application of an engine process: JSON in, JSON out. Subclasses add routes."""

    def __init__(self) -> None:
        self.routes: dict[tuple[str, str], Handler] = {("GET", "/health"): self.health}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        try:
            handler = self.routes.get((scope["method"], scope["path"]))
            if handler is None:
                raise ApiError(404, "There is no such route.")
            body = await read_body(receive, MOST_BYTES)
            request = json.loads(body or b"{}")
            CLIENT.set(str(request.pop("client", "")))
            await self.handle(handler, request, receive, send)
        except ApiError as error:
            headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
            await respond(send, error.status, error.body(), headers)
        except ClientGone:
            return

    async def handle(self, handler: Handler, body: dict[str, Any], receive: Receive, send: Send) -> None:
        async with while_connected(receive):
            answer = dumps(await handler(body))
        await respond(send, 200, answer)

    async def health(self, body: dict[str, Any]) -> dict[str, Any]:
        return {}


class LanguageApp(EngineApp):
    """A language model and its adapters."""

    def __init__(self, model: LocalModel, scheduler: Scheduler):
        super().__init__()
        self.model, self.scheduler = model, scheduler
        self._tokenizer_thread = TurnThreads("render")  # one thread: a tokenizer's truncation settings are shared state
        self._image_threads = TurnThreads("images", IMAGE_THREADS)
        self._pending_image_bytes: dict[PromptImages, int] = {}
        """Bytes of image inputs whose prompts are not submitted yet."""
        self.routes |= {
            ("GET", "/health"): self.health,
            ("GET", "/v1/models"): self.models,
            ("POST", "/v1/chat/completions"): self.chat,
            ("POST", "/v1/completions"): self.complete,
            ("POST", "/v1/responses"): self.respond,
            ("POST", "/tokenize"): self.tokenize,
            ("POST", "/v1/load_lora_adapter"): self.load,
            ("POST", "/v1/unload_lora_adapter"): self.unload,
        }

    async def handle(self, handler: Handler, body: dict[str, Any], receive: Receive, send: Send) -> None:
        if not body.get("stream"):
            await super().handle(handler, body, receive, send)
            return
        async with while_connected(receive):
            answers = await self._submit(handler, body)
        try:
            async with while_connected(receive):
                await send({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
                async for line in answers.events():
                    await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            answers.cancel()

    async def _submit(self, handler: Handler, body: dict[str, Any]) -> Answers:
        """Read a request, submit it to the scheduler and return its answers. Raises ApiError."""
        self._check_model(body)
        answers: Answers
        if handler == self.chat:
            answers = await self._prepare_chat(body)
        elif handler == self.respond:
            with naming_input():
                answers = await self._prepare_chat(as_chat(body), partial(ResponseAnswers, request=body))
        else:
            prompts = [await self._ids(body, prompt) for prompt in split_prompts(body["prompt"])]
            tokenized = body | {"prompt": prompts}
            answers = await self._run_tokenizer(lambda: TextAnswers(self.model, self.scheduler, tokenized))
        answers.submit()
        return answers

    async def _prepare_chat(
        self, body: dict[str, Any], make_answers: Callable[..., ChatAnswers] = ChatAnswers
    ) -> ChatAnswers:
        """Prepare the answers to a conversation. Raises ApiError."""
        conversation = await self._read_conversation(body)
        chat = await self._run_tokenizer(lambda: make_answers(self.model, self.scheduler, body, conversation))
        chat.refuse_large()
        chat.image_inputs = await self._image_inputs(conversation, chat.prompt)
        return chat

    async def _read_conversation(self, body: dict[str, Any]) -> Conversation:
        """Read a request's messages and the sizes of their images. Raises ApiError."""
        conversation = await self._run_tokenizer(
            lambda: read_messages(self.model, str(body["model"]), body["messages"])
        )
        if conversation.images is not None:
            await self._each_image(conversation.images, conversation.images.measure)
        return conversation

    async def _image_inputs(self, conversation: Conversation, ids: list[int]) -> ImageInputs | None:
        """Return the model's image inputs for a prompt, or None if it has no images. Raises ApiError.

        The prompt must be known to fit: its images are decoded now.
        """
        images = conversation.images
        if images is None:
            return None

        def build() -> ImageInputs:
            with api_errors_for_messages():
                return self.model.image_inputs(ids, images.inputs(ids), images.processor)

        try:
            await self._each_image(images, images.look, lambda: self._reserve_image_bytes(images))
            return await self._image_threads.run(CLIENT.get(), build)
        finally:
            self._pending_image_bytes.pop(images, None)

    def _reserve_image_bytes(self, images: PromptImages) -> None:
        """Raise ApiError if these image inputs do not fit into memory together with those of other requests."""
        self._pending_image_bytes.pop(images, None)
        if not self.scheduler.has_room_for_images(images.bytes, sum(self._pending_image_bytes.values())):
            raise busy()
        self._pending_image_bytes[images] = images.bytes

    async def _each_image(
        self, images: PromptImages, work: Callable[[int], None], after_each: Callable[[], None] = lambda: None
    ) -> None:
        """Call `work` in a thread with the number of each image. Other requests get their turn between two images.

        after_each: called in the event loop after each image.
        """

        def work_on_image(number: int) -> None:
            with api_errors_for_messages():
                work(number)

        for number in range(len(images)):
            await self._image_threads.run(CLIENT.get(), partial(work_on_image, number))
            after_each()

    async def _run_tokenizer(self, function: Callable[[], T]) -> T:
        """Return the result of `function`, which uses the tokenizer.

        It runs in a thread, since megabytes of text take seconds and would stop all streams.
        """
        return await self._tokenizer_thread.run(CLIENT.get(), function)

    async def _ids(self, body: dict[str, Any], prompt: str | list[int]) -> list[int]:
        """Return a prompt's tokens. Raises ApiError.

        Each prompt of a request is tokenized separately, so that other requests get their turn in between.
        """
        if not isinstance(prompt, str):
            return prompt
        return await self._run_tokenizer(lambda: text_ids(self.model, str(body["model"]), prompt))

    def _check_model(self, body: dict[str, Any]) -> str:
        """Return the name of the requested model. Raises ApiError if there is no such model."""
        name = body.get("model")
        if name not in self.model.names:
            raise ApiError(404, f"There is no model {str(name)[:80]!r}.", param="model", code="model_not_found")
        return str(name)

    async def health(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.scheduler.is_alive:
            raise ApiError(500, "The computing thread has ended.", code="engine_error")
        return {"dtype": self.model.dtype, "context": self.model.limit, **self.scheduler.state()}

    async def models(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.model.names]}

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        return await (await self._submit(self.chat, body)).answer()

    async def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        return await (await self._submit(self.respond, body)).answer()

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" in body:
            return await self._score_prompt(body)
        return await (await self._submit(self.complete, body)).answer()

    async def _score_prompt(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the log-probability of each token of a prompt, in vLLM's form. Its images are those of `messages`."""
        name = self._check_model(body)
        (ids,) = split_prompts(body["prompt"])
        if isinstance(ids, str):
            text = ids
            ids = await self._run_tokenizer(lambda: self.model.text_ids(name, text))
        image_inputs = (
            await self._image_inputs(await self._read_conversation(body), ids) if "messages" in body else None
        )
        logprobs = await asyncio.wrap_future(self.scheduler.call(lambda: self.model.logprobs(name, ids, image_inputs)))
        entries = [None, *({str(token): {"logprob": value}} for token, value in zip(ids[1:], logprobs, strict=True))]
        return {"choices": [{"index": 0, "text": "", "prompt_logprobs": entries, "prompt_token_ids": ids}]}

    async def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        name = self._check_model(body)
        if "messages" in body:
            conversation = await self._read_conversation(body)
            tools, arguments = body.get("tools"), body.get("chat_template_kwargs")
            ids = await self._run_tokenizer(lambda: chat_prompt(self.model, name, conversation, tools, arguments))
        else:
            ids = await self._run_tokenizer(lambda: self.model.text_ids(name, body["prompt"]))
        return {"tokens": ids, "count": len(ids), "max_model_len": self.model.limit}

    async def load(self, body: dict[str, Any]) -> dict[str, Any]:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.model.names and not body.get("load_inplace"):
            raise ApiError(400, f"The name {name!r} is taken.", param="lora_name")
        try:
            await asyncio.wrap_future(self.scheduler.call(lambda: self._load(name, folder)))
        except UserError as error:
            raise ApiError(400, str(error), param="lora_path") from None
        return {}

    def _load(self, name: str, folder: Path) -> None:
        """Load an adapter in the computing thread."""
        self.model.forget_retired(self.scheduler.adapters())
        try:
            self.model.load(name, folder)
        finally:
            if self.model.damaged:  # the model must not answer anything now; the gateway restarts the engine
                self.scheduler.give_up()

    async def unload(self, body: dict[str, Any]) -> dict[str, Any]:
        name = self._check_model({"model": body["lora_name"]})
        await asyncio.wrap_future(self.scheduler.call(lambda: self.model.unload(name)))
        return {}
