"""Answers `/v1/chat/completions` and `/v1/completions` in the local engine.

A request becomes sequences for the scheduler, and the pieces of text that these emit become its answers.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstune.data.chat.tool_calls import Call, ToolForm, ToolText, form_of
from dstune.generation.sampler import Chosen, Sampling
from dstune.generation.text import Piece, TextStream
from dstune.serve.asgi import event
from dstune.serve.engines.local.engine import DEFAULT_MAX_TOKENS
from dstune.serve.engines.local.model import ImageInputs, LocalModel
from dstune.serve.engines.local.prompts import Conversation, busy, chat_prompt, split_prompts, text_ids, too_long
from dstune.serve.engines.local.scheduler import QueueFull, Scheduler
from dstune.serve.engines.local.sequences import Sequence
from dstune.serve.errors import ApiError, error_body
from dstune.serve.turns import CLIENT


@dataclass
class Choice:
    """One answer while it is generated."""

    index: int
    prompt: list[int]
    tools: ToolText | None = None
    tool_names: frozenset[str] = frozenset()
    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish: str | None = None
    count: int = 0

    def add_piece(self, piece: Piece) -> Piece:
        """Add a piece to the answer, and return it with the part of its text that can be sent now."""
        if self.tools is not None:
            piece.text = self.tools.push(piece.text)
            if piece.finish:
                last_text, calls = self.tools.finish()
                if calls and all(call["function"]["name"] in self.tool_names for call in calls):
                    self.calls = calls
                    piece.finish = "tool_calls" if piece.finish == "stop" else piece.finish
                else:
                    piece.text += last_text or self.tools.unread
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish
        return piece


PromptRequest = tuple[list[int], list[Sampling], list[Choice]]
"""A prompt with the sampling settings and choices of its answers."""


class Answers:
    """The answers to a request: the sequences of its prompts and choices, and the output that they emit.

    They are created in the tokenizer's thread. Everything else runs in the event loop, to which a queue brings the pieces of the
    computing thread.
    """

    def __init__(self, model: LocalModel, scheduler: Scheduler, body: Mapping[str, Any]):
        self.model, self.scheduler, self.body = model, scheduler, body
        self.name = str(body["model"])
        self._adapter = model.adapter(self.name)
        self.stream = bool(body.get("stream"))
        if body.get("stream_options") and not self.stream:
            raise ApiError(400, "stream_options needs stream=true.", param="stream_options")
        self.n = int(body.get("n", 1))
        self.created = int(time.time())
        self._queue: asyncio.Queue[tuple[Choice, Piece]] = asyncio.Queue()
        self._sequences: list[Sequence] = []
        self.choices: list[Choice] = []
        self.requests: list[PromptRequest] = []
        self.image_inputs: ImageInputs | None = None
        """The model's image inputs for the prompt; set before `submit`."""

    def sampling(self, length: int, index: int, max_tokens: int | None) -> Sampling:
        """Return the sampling settings of answer `index` to a prompt of `length` tokens.

        max_tokens: as requested; None for the default. Raises ApiError if the context has no room for the answer.
        """
        body, limit = self.body, self.model.limit
        if length + (max_tokens or 1) > limit:
            raise too_long(limit, str(length), max_tokens or 1, "messages" if "messages" in body else "prompt")
        values = dict(self.model.defaults()) | {name: body[name] for name in SAMPLING if name in body}
        stop = body.get("stop") or ()
        seed = body.get("seed")
        values["top_k"] = max(int(values.get("top_k", 0)), 0)
        return Sampling(
            max_tokens=max_tokens or min(DEFAULT_MAX_TOKENS, limit - length),
            seed=secrets.randbits(63) if seed is None else (int(seed) + index) % 2**63,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logit_bias=self._read_bias(body.get("logit_bias") or {}),
            logprobs=self.logprobs(),
            **values,
        )

    def logprobs(self) -> int | None:
        """Return how many alternatives are reported for each token; None for no log-probabilities."""
        raise NotImplementedError

    def _read_bias(self, logit_bias: Mapping[str, float]) -> dict[int, float]:
        bias = {int(token): float(value) for token, value in logit_bias.items()}
        if unknown := [token for token in bias if token >= self.model.vocabulary]:
            raise ApiError(400, f"Invalid logit_bias: there is no token {unknown[0]}.", param="logit_bias")
        return bias

    def refuse_large(self) -> None:
        """Raise ApiError if the request can never fit into the engine's cache."""
        for prompt, samplings, _ in self.requests:
            tokens = sum(len(prompt) + sampling.max_tokens for sampling in samplings)
            try:
                self.scheduler.refuse_large(tokens, len(samplings))
            except ValueError as error:
                raise ApiError(400, f"The request is too large: {error}.", code="context_length_exceeded") from None

    def submit(self) -> None:
        """Submit all answers of the request to the scheduler.

        Raises ApiError if the queue is full or the request can never fit; then none of its answers is computed.
        """
        self.refuse_large()
        try:
            for prompt, samplings, choices in self.requests:
                self._submit(prompt, samplings, choices)
        except BaseException:
            self.cancel()
            raise
        finally:
            self.image_inputs = None  # the queued prompt holds it now, and it may be a gigabyte

    def _submit(self, prompt: list[int], samplings: list[Sampling], choices: list[Choice]) -> None:
        loop = asyncio.get_running_loop()
        sequences = []
        for sampling, choice in zip(samplings, choices, strict=True):
            stream = TextStream(
                lambda ids: self.model.decode(self.name, ids),
                self.model.ends(self.name),
                sampling.stop,
                sampling.max_tokens,
            )

            def emit(piece: Piece, choice: Choice = choice, stream: TextStream = stream) -> None:
                choice.count = stream.count
                if piece.finish:
                    choice.ids = stream.ids
                loop.call_soon_threadsafe(self._queue.put_nowait, (choice, piece))

            sequences.append(Sequence(prompt, sampling, stream, emit, self._adapter))
        try:
            self.scheduler.submit(sequences, CLIENT.get(), self.image_inputs)
        except QueueFull:
            raise busy() from None
        self._sequences += sequences
        self.choices += choices

    def cancel(self) -> None:
        for sequence in self._sequences:
            sequence.cancelled = True

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """Yield each choice with its next piece. Raises ApiError if the engine fails."""
        open_choices = len(self.choices)
        while open_choices:
            choice, piece = await self._queue.get()
            if piece.finish == "error":
                status = 500 if self.scheduler.is_alive else 503  # the engine is restarted, so the client may retry
                raise ApiError(status, f"The engine failed: {piece.error}.", code="engine_error")
            piece = choice.add_piece(piece)
            open_choices -= piece.finish is not None
            if piece.text or piece.tokens or piece.finish:
                yield choice, piece

    def usage(self) -> dict[str, int]:
        prompts = {id(choice.prompt): len(choice.prompt) for choice in self.choices}
        prompt_tokens, completion_tokens = sum(prompts.values()), sum(choice.count for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a stream."""
        with_usage = bool((self.body.get("stream_options") or {}).get("include_usage"))
        extra = {"usage": None} if with_usage else {}
        try:
            for first in self.first_chunks():
                yield event(first | extra)
            async for choice, piece in self.pieces():
                for chunk in self.chunks(choice, piece):
                    yield event(chunk | extra)
        except ApiError as error:
            yield b"data: " + error_body(error.status, str(error), error.param, error.code) + b"\n\n"
            return
        finally:
            self.cancel()
        if with_usage:
            yield event({**self.head(chunk=True), "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    async def answer(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed. Raises ApiError if the engine fails."""
        try:
            async for _ in self.pieces():
                pass
        finally:
            self.cancel()
        choices = [self.final(choice) for choice in self.choices]
        return {**self.head(chunk=False), "choices": choices, "usage": self.usage()}

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """Return the fields of an answer, or of a chunk of a stream, beside `choices` and `usage`."""
        raise NotImplementedError

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks that begin a stream, before any text."""
        return []

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunks of a stream that carry a piece of text."""
        raise NotImplementedError

    def final(self, choice: Choice) -> dict[str, Any]:
        """Return the entry of `choices` for a complete answer."""
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        return self.model.decode(self.name, [token], special=True)


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


class ChatAnswers(Answers):
    """The answers to a conversation."""

    def __init__(self, model: LocalModel, scheduler: Scheduler, body: Mapping[str, Any], conversation: Conversation):
        """conversation: the request's messages, whose images have been measured. Raises ApiError."""
        super().__init__(model, scheduler, body)
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        if not model.chats(self.name):
            raise ApiError(400, "This model has no chat template; use /v1/completions.", param="messages")
        tools = body.get("tools") or None
        form = self._tool_form(tools)
        if body.get("tool_choice", "auto") not in ("auto", "none"):
            reason = "tool_choice must be 'auto' or 'none': this engine cannot force a model to call a tool."
            raise ApiError(400, reason, param="tool_choice", code="unsupported_parameter")
        if body.get("tool_choice") == "none":
            tools = form = None
        self.prompt = chat_prompt(model, self.name, conversation, tools, body.get("chat_template_kwargs"))
        names = frozenset(tool["function"]["name"] for tool in tools or ())
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens")
        if (body.get("max_tokens") or max_tokens) != max_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ.", param="max_tokens")
        samplings = [self.sampling(len(self.prompt), index, max_tokens) for index in range(self.n)]
        choices = [Choice(index, self.prompt, ToolText(form) if form else None, names) for index in range(self.n)]
        self.requests = [(self.prompt, samplings, choices)]

    def _tool_form(self, tools: Any) -> ToolForm | None:
        """Return the form in which the model writes calls; None without tools. Raises ApiError if the template has no known one."""
        if not tools:
            return None
        template = self.model.template(self.name)
        form = form_of(template) if template is not None else None
        if form is None:
            reason = "This model's chat template does not show tools, or writes calls in an unsupported form."
            raise ApiError(400, reason, param="tools", code="unsupported_parameter")
        return form

    def logprobs(self) -> int | None:
        if not self.body.get("logprobs"):
            if self.body.get("top_logprobs"):
                raise ApiError(400, "top_logprobs needs logprobs=true.", param="top_logprobs")
            return None
        return int(self.body.get("top_logprobs", 0))

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def first_chunks(self) -> list[dict[str, Any]]:
        return [self._chunk(choice.index, {"role": "assistant", "content": ""}) for choice in self.choices]

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        logprobs = self._logprobs_of(piece.tokens)
        if piece.text or piece.tokens:
            chunks.append(self._chunk(choice.index, {"content": piece.text}, logprobs))
        if choice.calls:
            calls = [{"index": number, **call} for number, call in enumerate(choice.calls)]
            chunks.append(self._chunk(choice.index, {"tool_calls": calls}))
        if piece.finish:
            last = self._chunk(choice.index, {}, finish=piece.finish)
            if self.body.get("return_token_ids"):
                last["choices"][0]["token_ids"] = choice.ids
            chunks.append(last)
        return chunks

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head(chunk=True), "choices": [choice]}

    def final(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["tool_calls"] = choice.calls
            message["content"] = choice.text.strip() or None
        logprobs = self._logprobs_of(choice.tokens)
        value = {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}
        return value | ({"token_ids": choice.ids} if self.body.get("return_token_ids") else {})

    async def answer(self) -> dict[str, Any]:
        answer = await super().answer()
        return answer | ({"prompt_token_ids": self.prompt} if self.body.get("return_token_ids") else {})

    def _logprobs_of(self, tokens: list[Chosen]) -> dict[str, Any] | None:
        if self.logprobs() is None:
            return None
        content = [
            self._token_logprob(chosen.token, chosen.logprob)
            | {"top_logprobs": [self._token_logprob(*alternative) for alternative in chosen.top]}
            for chosen in tokens
        ]
        return {"content": content, "refusal": None}

    def _token_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}


class TextAnswers(Answers):
    """Continuations of texts or token ids."""

    def __init__(self, model: LocalModel, scheduler: Scheduler, body: Mapping[str, Any]):
        """Raises ApiError."""
        super().__init__(model, scheduler, body)
        self.id = f"cmpl-{secrets.token_hex(12)}"
        prompts = [self._ids(text) for text in split_prompts(body["prompt"])]
        max_tokens = body.get("max_tokens", 16)
        for number, prompt in enumerate(prompts):
            samplings = [self.sampling(len(prompt), index, max_tokens) for index in range(self.n)]
            choices = [Choice(number * self.n + index, prompt) for index in range(self.n)]
            self.requests.append((prompt, samplings, choices))

    def _ids(self, prompt: Any) -> list[int]:
        ids: list[int] = text_ids(self.model, self.name, prompt) if isinstance(prompt, str) else prompt
        if not ids or max(ids) >= self.model.vocabulary:
            raise ApiError(
                400, "Invalid prompt: it has no tokens, or tokens that the model does not have.", param="prompt"
            )
        return ids

    def logprobs(self) -> int | None:
        count: int | None = self.body.get("logprobs")
        return count

    def head(self, *, chunk: bool) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.name}

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        start = len(choice.text) - len(piece.text)
        value = self._choice(choice, piece.text, piece.tokens, start, piece.finish)
        if piece.finish and self.body.get("return_token_ids"):
            value |= {"token_ids": choice.ids, "prompt_token_ids": choice.prompt}
        return [{**self.head(chunk=True), "choices": [value]}]

    def final(self, choice: Choice) -> dict[str, Any]:
        value = self._choice(choice, choice.text, choice.tokens, 0, choice.finish)
        if self.body.get("return_token_ids"):
            value |= {"token_ids": choice.ids, "prompt_token_ids": choice.prompt}
        return value

    def _choice(
        self, choice: Choice, text: str, tokens: list[Chosen], start: int, finish: str | None
    ) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self.logprobs() is not None:
            texts = [self.token_text(chosen.token) for chosen in tokens]
            offsets = list(itertools.accumulate(map(len, texts[:-1]), initial=start))[: len(texts)]
            logprobs = {
                "tokens": texts,
                "token_logprobs": [max(chosen.logprob, -9999.0) for chosen in tokens],
                "top_logprobs": [{self.token_text(t): max(v, -9999.0) for t, v in chosen.top} for chosen in tokens],
                "text_offset": offsets,
            }
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish}
