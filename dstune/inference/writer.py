"""Generates answers with a model in memory: several at a time, or one that is shown while it is being written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstune.core.errors import Problem, UserError
from dstune.inference.prompts import Request, with_system
from dstune.inference.voices import BASE, Speaker
from dstune.protocols import task_of
from dstune.protocols.task_options import AsksForTargets

if TYPE_CHECKING:
    from dstune.data.chat.prompt import ChatPrompts
    from dstune.data.control import ControlTokens
    from dstune.data.images.request import PromptImages
    from dstune.data.tokenize.sample import SourcePrompts
    from dstune.protocols.task import TaskConfig


@dataclass(frozen=True)
class Sampling:
    """Settings of how tokens are chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """Temperature; 0 always takes the most probable token."""
    top_p: float = 1.0
    """Sample from the most probable tokens whose probabilities add up to this share."""
    top_k: int = 0
    """Sample from this many of the most probable tokens; 0 for all."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end an answer, in addition to the model's end token."""


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    """Written, the end included."""
    ended: str
    """`end`: the model ended its turn; `stop`: one of the stop texts; `length`: cut; `interrupted`."""


class Writer:
    """Generates answers with a model's voices."""

    def __init__(self, speaker: Speaker, sampling: Sampling, *, plain: bool = False, system: str | None = None):
        """plain: continue the text as it is, without the chat template. system: first message of conversations."""
        self._model, self._voices = speaker.model, speaker.voices
        self._sampling, self._plain, self._system = sampling, plain, system
        self._prompts: dict[str, ChatPrompts] = {}
        self._controls: dict[str, ControlTokens] = {}
        self._asking: dict[str, SourcePrompts] = {}
        self.active = next(iter(speaker.voices))

    @property
    def names(self) -> list[str]:
        """The names of the adapters, and `base` for the model without one."""
        return list(self._voices)

    def is_chat(self, name: str) -> bool:
        return self._voices[name].chat and not self._plain

    def prompt_ids(self, request: Request) -> list[int]:
        """Return the token ids of the prompt. Raises UserError if the template refuses the conversation."""
        return self._prompt(request)[0]

    def _prompt(self, request: Request) -> tuple[list[int], PromptImages | None]:
        """Return the token ids of the prompt, and its images. Raises UserError."""
        name = request.adapter or self.active
        if request.images and self.is_chat(name) and self._voices[name].task is None:
            return self._prompt_with_images(request, name)
        return self._prompt_of_text(request, name), None

    def _prompt_of_text(self, request: Request, name: str) -> list[int]:
        from dstune.data.chat.template import RenderError

        task = self._voices[name].task
        if task is not None and not self._plain:
            if request.messages is not None or self._system or request.tools:
                reason = "holds messages or tools, but the model writes targets for sources"
                raise UserError(Problem(request.where, reason, "give the source as `prompt`, without --system"))
            return self._sources(name, task).prompt_ids(request.text, request.arguments)
        if not self.is_chat(name):
            if request.messages is not None or self._system:
                reason = "holds messages, but the model has no chat template (or --plain switched it off)"
                if request.messages is None:
                    reason = (
                        "a system message needs a chat template, which the model lacks (or --plain switched it off)"
                    )
                raise UserError(Problem(request.where, reason, "give `prompt` instead, without --system"))
            if request.tools or request.arguments:
                reason = (
                    "has tools or chat_template_kwargs, but the model has no chat template (or --plain switched it off)"
                )
                raise UserError(Problem(request.where, reason, "leave them out"))
            return self._control(name).sequence([request.text], sys.maxsize)[0]
        request_with_system = with_system(request, self._system)
        messages = request_with_system.messages or [{"role": "user", "content": request_with_system.text}]
        try:
            return self._prompts_of(name).ids(
                messages, tools=request_with_system.tools, arguments=request_with_system.arguments
            )
        except RenderError as error:
            raise UserError(Problem(request.where, str(error))) from error

    def _prompt_with_images(self, request: Request, name: str) -> tuple[list[int], PromptImages]:
        """Return the same for a request with images. Raises UserError."""
        from dstune.config.architectures import vision_of
        from dstune.data.chat.template import RenderError
        from dstune.data.images.processor import processor_of, refusal
        from dstune.data.images.request import PromptImages
        from dstune.data.problems import RowError

        vision = vision_of(self._voices[name].tokenizer)
        if refused := refusal(vision, "the model"):
            raise UserError(Problem(request.where, f"holds an image; {refused}"))
        assert vision is not None
        images, requested = (
            PromptImages(processor_of(vision), request.images, request.root),
            with_system(request, self._system),
        )
        try:
            ids = self._prompts_of(name).ids(
                requested.messages or [],
                tools=requested.tools,
                arguments=requested.arguments,
                place_images=images.measured().place,
            )
        except (RenderError, RowError) as error:
            raise UserError(Problem(request.where, str(error))) from error
        return ids, images

    def _seen(self, request: Request, ids: Sequence[int], images: PromptImages | None) -> dict[str, Any] | None:
        """Return the model's inputs for the images of a prompt; None if it has none. Raises UserError."""
        from dstune.data.problems import RowError

        try:
            return None if images is None else images.all_inputs(ids)
        except RowError as error:
            raise UserError(Problem(request.where, str(error))) from error

    def answer(self, requests: Sequence[Request], number: int = 0) -> list[Answer]:
        """Return the answers to `requests`, computed together, in their order.

        number: the batch's number, which determines the random draws together with the seed. Requests for one adapter share a
        forward pass, padded on the left. A request whose answer the model's limit makes shorter than asked is computed alone.
        """
        import torch

        # Any whole number is a seed; torch takes 64 bits, in which those that fit, negative ones too, stay what they are.
        torch.manual_seed((self._sampling.seed * 2**20 + number) % 2**64)
        prompted = [self._prompt(request) for request in requests]
        prompts = [ids for ids, _ in prompted]
        seen = [self._seen(request, *of_request) for request, of_request in zip(requests, prompted, strict=True)]
        groups: dict[tuple[str, int], list[int]] = {}
        for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            cut = self._room(len(prompt), request) < self._sampling.max_new_tokens
            apart = index if cut or seen[index] is not None else -1
            groups.setdefault((request.adapter or self.active, apart), []).append(index)
        answers: dict[int, Answer] = {}
        for (name, _), members in groups.items():
            longest = max(len(prompts[index]) for index in members)
            written = self._generate(
                name,
                [prompts[index] for index in members],
                self._room(longest, requests[members[0]]),
                images=seen[members[0]],
            )
            for index, row in zip(members, written, strict=True):
                answers[index] = self._finished(name, row)
        return [answers[index] for index in range(len(requests))]

    def stream(
        self, request: Request, show: Callable[[str], None], interrupted: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Return the answer to one request; `show` gets its text piece by piece. interrupted: called after every token."""
        name = request.adapter or self.active
        prompt, shown = self._prompt(request)
        room = self._room(len(prompt), request)
        images = self._seen(request, prompt, shown)
        (row,) = self._generate(name, [prompt], room, show=show, interrupted=interrupted, images=images)
        return self._finished(name, row, interrupted=interrupted())

    def _generate(
        self,
        name: str,
        prompts: list[list[int]],
        room: int,
        *,
        show: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        images: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt. images: what the model gets of those in the only prompt."""
        import torch

        from dstune.generation.answers import Decoding, write_tokens
        from dstune.generation.sampler import Chosen
        from dstune.generation.text import TextStream

        tokenizer, sampling, ends = self._voices[name].tokenizer, self._sampling, frozenset(self._ends(name))
        limit = min(sampling.max_new_tokens, room)
        streams = [
            TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), ends, sampling.stop, limit)
            for _ in prompts
        ]

        def is_over(row: int, ids: list[int]) -> bool:
            stream = streams[row]
            if not stream.finished:
                piece = stream.push(Chosen(ids[-1]))
                if show is not None and piece.text:
                    show(piece.text)
            return stream.finished or (interrupted is not None and interrupted())

        decoding = Decoding(
            limit, ends, tokenizer.pad_token_id or 0, sampling.temperature, sampling.top_p, sampling.top_k
        )
        is_watched = bool(sampling.stop) or show is not None
        with torch.inference_mode(), self._speaking(name):
            rows = write_tokens(self._model, prompts, decoding, images=images, is_over=is_over if is_watched else None)
        # A row that a stop text ended is padded like one with an end token, but nothing in it says where.
        return [row[: stream.count] for row, stream in zip(rows, streams, strict=True)] if is_watched else rows

    def _speaking(self, name: str) -> Any:
        """Return a context in which the model uses that adapter, or none."""
        if not hasattr(self._model, "peft_config"):
            return nullcontext()
        if name == BASE:
            return self._model.disable_adapter()
        self._model.set_adapter(name)
        return nullcontext()

    def _finished(self, name: str, row: list[int], *, interrupted: bool = False) -> Answer:
        voice = self._voices[name]
        ends = set(self._ends(name))
        length = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        ended = "end" if length and row[length - 1] in ends else "length"
        text: str = voice.tokenizer.decode(row[:length], skip_special_tokens=True)
        stop_start = min((text.find(stop) for stop in self._sampling.stop if stop in text), default=-1)
        if stop_start >= 0:
            text, ended = text[:stop_start], "stop"
        elif interrupted and ended == "length":
            ended = "interrupted"
        return Answer(text.strip(), length, ended)

    def _ends(self, name: str) -> list[int]:
        from dstune.data.stopping import stop_token_ids
        from dstune.generation.answers import end_tokens

        return end_tokens(self._model, stop_token_ids(self._voices[name].tokenizer))

    def _control(self, name: str) -> ControlTokens:
        from dstune.data.control import ControlTokens

        if name not in self._controls:
            self._controls[name] = ControlTokens(self._voices[name].tokenizer)
        return self._controls[name]

    def _sources(self, name: str, task: TaskConfig) -> SourcePrompts:
        from dstune.config.architectures import is_encoder_decoder

        if name not in self._asking:
            tokenizer = self._voices[name].tokenizer
            asking = task_of(task)
            assert isinstance(asking, AsksForTargets), "only prompts of sources are asked"
            self._asking[name] = asking.sources(tokenizer, encoder_decoder=is_encoder_decoder(tokenizer))
        return self._asking[name]

    def _prompts_of(self, name: str) -> ChatPrompts:
        from dstune.data.chat.prompt import ChatPrompts

        if name not in self._prompts:
            voice = self._voices[name]
            self._prompts[name] = ChatPrompts(voice.tokenizer, voice.date)
        return self._prompts[name]

    def _room(self, length: int, request: Request) -> int:
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        settings = getattr(self._model, "peft_config", {}).get(request.adapter or self.active)
        longest -= getattr(settings, "num_virtual_tokens", None) or 0
        if self._model.config.is_encoder_decoder and length <= longest:
            return int(longest)  # what is read and what is written have lengths of their own
        if length >= longest:
            raise UserError(Problem(request.where, f"has {length} tokens; the model takes {longest}, answer included"))
        return int(longest - length)
