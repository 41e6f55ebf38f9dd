"""The computing thread: sequences join and leave a batch between two tokens. A forward pass uses one adapter, so each adapter has
its own batch, and the thread runs one step of each batch in turn. New prompts are prefilled in chunks between the steps, so that a
long one does not stop the others."""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dstune.core.errors import first_line
from dstune.models.generation import placed_images
from dstune.serve.engines.local.caches import is_joinable, joined, map_cache, new_cache, widened
from dstune.serve.engines.local.model import ImageInputs
from dstune.serve.engines.local.sampling import Sampler, Sampling
from dstune.serve.engines.local.text import Piece, TextStream

log = logging.getLogger("dstune.serve")


class QueueFull(Exception):
    """The queue of prompts is full."""


class Sequence:
    """One answer that is being generated."""

    def __init__(
        self, prompt: list[int], sampling: Sampling, stream: TextStream, emit: Callable[[Piece], None], adapter: str
    ):
        """emit: called by the computing thread with each piece."""
        self.prompt, self.stream, self.emit, self.adapter = prompt, stream, emit, adapter
        self.sampler = Sampler(sampling, prompt)
        self.last = prompt[-1]
        self.shift = 0
        """Offset of its next position from its token count: an image has more or fewer positions than tokens."""
        self.cancelled = False

    @property
    def done(self) -> bool:
        return self.cancelled or self.stream.finished

    def take(self, logits: Tensor) -> bool:
        """Choose a token from `logits`, float [vocabulary], and emit the text that it completes. Returns whether the answer
        continues. An error ends this answer alone."""
        try:
            chosen = self.sampler.choose(logits)
            piece = self.stream.push(chosen)
        except Exception as error:
            log.exception("a token could not be chosen")
            self.fail(first_line(error))
            return False
        self.last = chosen.token
        if piece.text or piece.tokens or piece.finish:
            self.emit(piece)
        return not self.done

    def fail(self, reason: str) -> None:
        if not self.done:
            self.stream.finished = True
            self.emit(Piece(finish="error", error=reason))


@dataclass
class _Prompt:
    """A prompt that is being prefilled, for one or more answers."""

    sequences: list[Sequence]
    client: str = ""
    turn: int = 0
    """How many waiting prompts of the same client come before it."""
    images: ImageInputs | None = None
    cache: Any = None
    read: int = 0

    @property
    def image_bytes(self) -> int:
        return 0 if self.images is None else self.images.bytes

    @property
    def ids(self) -> list[int]:
        return self.sequences[0].prompt

    @property
    def tokens(self) -> int:
        """The most cache positions that these answers can take together."""
        return sum(len(self.ids) + sequence.sampler.sampling.max_tokens for sequence in self.sequences)


class _Batch:
    """Sequences of one adapter that are generated together, padded on the left."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.cache: Any = None
        self.mask = torch.empty(0, 0, dtype=torch.long)

    def join(self, sequence: Sequence, cache: Any, length: int) -> None:
        mask = torch.ones(1, length, dtype=torch.long)
        if not self.sequences:
            self.cache, self.mask = cache, mask
        else:
            width = max(length, self.mask.shape[1])
            self.cache = joined(widened(self.cache, width), widened(cache, width))
            pad = torch.nn.functional.pad
            rows = [pad(part_mask, (width - part_mask.shape[1], 0)) for part_mask in (self.mask, mask)]
            self.mask = torch.cat(rows)
        self.sequences.append(sequence)

    def leave(self) -> None:
        """Remove the finished sequences."""
        remaining = [number for number, sequence in enumerate(self.sequences) if not sequence.done]
        if len(remaining) == len(self.sequences):
            return
        self.sequences = [self.sequences[number] for number in remaining]
        if not remaining:
            self.cache = None
            return
        rows = torch.tensor(remaining)
        self.mask = self.mask[rows]
        first = int(self.mask.argmax(-1).min())  # columns that are padding for all
        self.mask = self.mask[:, first:]
        self.cache = map_cache(self.cache, lambda tensor: tensor[rows.to(tensor.device), :, first:])


class Scheduler:
    """The computing thread. Its methods may be called from any thread."""

    def __init__(
        self,
        model: Any,
        speaking: Callable[[str], AbstractContextManager[Any]],
        *,
        max_sequences: int = 16,
        max_waiting: int = 64,
        max_cached_tokens: int = 65536,
        chunk: int = 512,
        max_image_bytes: int = 2**30,
        failed: Callable[[], None] = lambda: None,
    ):
        """speaking: context manager that activates an adapter on the model. max_cached_tokens: of all sequences together, counted
        at their maximum length. max_image_bytes: of the image inputs of all waiting prompts. failed: called by the thread if it
        ends with a fault."""
        self._model, self._speaking = model, speaking
        self._max_sequences, self._max_waiting = max_sequences, max_waiting
        self._max_cached_tokens, self._chunk, self._max_image_bytes = max_cached_tokens, chunk, max_image_bytes
        self._joinable = is_joinable(model)
        # transformers 5.24 renamed this argument; both names are accepted until 5.40.
        self._cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        # Models with image positions reuse those of the previous prompt unless positions are passed.
        self._remembers_positions = any(hasattr(module, "rope_deltas") for module in model.modules())
        self._waiting: deque[_Prompt] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._reading: _Prompt | None = None
        self._batches: dict[tuple[str, int], _Batch] = {}
        self._changed = threading.Condition()
        self._stopped = self._broken = False
        self._failed = failed
        self.tokens = 0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def submit(self, sequences: list[Sequence], client: str = "", images: ImageInputs | None = None) -> None:
        """Queue the answers to one prompt, which may contain images. Prompts of several clients are prefilled in turn, and one
        client may take three quarters of the queue. Raises QueueFull; ValueError if the answers can never fit."""
        prompt = _Prompt(sequences, client, images=images)
        self.refuse_large(prompt.tokens, len(sequences))
        with self._changed:
            if len(self._waiting) >= self._max_waiting:  # prompts whose clients have disconnected do not count
                self._waiting = deque(
                    waiting for waiting in self._waiting if not all(sequence.done for sequence in waiting.sequences)
                )
            client_turns = [waiting.turn for waiting in self._waiting if waiting.client == client]
            if (
                self._stopped
                or len(self._waiting) >= self._max_waiting
                or len(client_turns) * 4 >= self._max_waiting * 3
            ):
                raise QueueFull
            if prompt.image_bytes and not self.has_room_for_images(prompt.image_bytes):
                raise QueueFull
            prompt.turn = client_turns[-1] + 1 if client_turns else self._waiting[0].turn if self._waiting else 0
            place = sum(waiting.turn <= prompt.turn for waiting in self._waiting)
            self._waiting.insert(place, prompt)
            self._changed.notify()

    def refuse_large(self, tokens: int, answers: int) -> None:
        """Raise ValueError if `answers` answers can never fit. tokens: of all of them, each with its prompt."""
        if tokens > self._max_cached_tokens or answers > self._max_sequences:
            raise ValueError(
                f"prompt and answers may take {tokens} tokens together; this engine holds {self._max_cached_tokens} in "
                f"{self._max_sequences} answers"
            )

    def has_room_for_images(self, size: int, unsubmitted: int = 0) -> bool:
        """Return whether image inputs of `size` bytes fit into memory beside those of the waiting prompts and `unsubmitted` bytes
        of prompts that are not submitted yet. Always true if there are no others."""
        with self._changed:
            other_bytes = unsubmitted + sum(waiting.image_bytes for waiting in self._waiting)
        return not other_bytes or other_bytes + size <= self._max_image_bytes

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Return a future for the result of `function`, which the computing thread runs between two steps."""
        future: Future[Any] = Future()
        with self._changed:
            if self._stopped:
                future.set_exception(RuntimeError("the engine is stopping"))
                return future
            self._calls.append((function, future))
            self._changed.notify()
        return future

    @property
    def alive(self) -> bool:
        """Whether the thread computes."""
        return self._thread.is_alive() and not self._stopped

    def state(self) -> dict[str, int]:
        with self._changed:
            running = sum(len(batch.sequences) for batch in self._batches.values())
            return {"waiting": len(self._waiting), "running": running, "tokens": self.tokens}

    def adapters(self) -> set[str]:
        """Return the adapters of running and waiting answers."""
        with self._changed:
            prompts = [*self._waiting, *([self._reading] if self._reading else [])]
            waiting = {sequence.adapter for prompt in prompts for sequence in prompt.sequences}
            return waiting | {adapter for adapter, _ in self._batches}

    def stop(self) -> None:
        """Stop the thread after the current step. Unfinished sequences fail."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def give_up(self) -> None:
        """Give up, from within the computing thread: it ends with a fault after the current call."""
        self._broken = True

    # -- the thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._run_calls()
                    if self._broken:
                        raise RuntimeError("the model is damaged")
                    self._read_prompt()
                    for key in list(self._batches):
                        self._step(key)
        except BaseException:
            log.exception("the computing thread has ended")
            self._stopped = True
            self._failed()
        with self._changed:
            self._stopped = True
        for sequence in self._all_sequences():
            sequence.fail("the engine is stopping")
        for _, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError("the engine is stopping"))

    def _all_sequences(self) -> list[Sequence]:
        prompts = [*self._waiting, *([self._reading] if self._reading else [])]
        of_batches = [sequence for batch in self._batches.values() for sequence in batch.sequences]
        return [sequence for prompt in prompts for sequence in prompt.sequences] + of_batches

    def _wait(self) -> bool:
        with self._changed:
            while not (self._stopped or self._calls or self._waiting or self._reading or self._batches):
                self._changed.wait()
            return not self._stopped

    def _run_calls(self) -> None:
        while self._calls and not self._broken:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():  # the client has gone
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _reserved(self) -> tuple[int, int]:
        """Return how many sequences and tokens are in the caches, counting each sequence at its maximum length."""
        running = [sequence for batch in self._batches.values() for sequence in batch.sequences]
        return len(running), sum(
            len(running_sequence.prompt) + running_sequence.sampler.sampling.max_tokens for running_sequence in running
        )

    def _read_prompt(self) -> None:
        """Prefill one chunk of the current prompt, or of the next one that fits."""
        if self._reading is None:
            with self._changed:
                while self._waiting and all(waiting_sequence.done for waiting_sequence in self._waiting[0].sequences):
                    self._waiting.popleft()
                if not self._waiting:
                    return
                count, tokens = self._reserved()
                first = self._waiting[0]
                if count and (
                    count + len(first.sequences) > self._max_sequences
                    or tokens + first.tokens > self._max_cached_tokens
                ):
                    return
                self._reading = self._waiting.popleft()
        prompt = self._reading
        if all(waiting_sequence.done for waiting_sequence in prompt.sequences):
            self._reading = None
            return
        try:
            if prompt.cache is None:
                prompt.cache = new_cache(self._model, plain=self._joinable)
            logits = self._read_chunk(prompt)
            if prompt.read < len(prompt.ids):
                return
            self._reading = None
            self._start_generation(prompt, logits)
        except Exception as error:
            log.exception("a prompt could not be read")
            self._reading = None
            for sequence in prompt.sequences:
                sequence.fail(first_line(error))

    def _read_chunk(self, prompt: _Prompt) -> Tensor:
        """Return the logits after the next chunk of a prompt. The first chunk extends to the end of the last image: a model takes
        all images of a prompt at once, and lets the tokens of some attend to each other."""
        start, end = prompt.read, min(prompt.read + self._chunk, len(prompt.ids))
        inputs: dict[str, Any] = {}
        if prompt.images is not None:
            end = max(end, prompt.images.last)
            inputs = placed_images(prompt.images.inputs_for(start, end), self._model) | {"logits_to_keep": 1}
        if self._remembers_positions and "position_ids" not in inputs:
            inputs["position_ids"] = torch.arange(start, end, device=next(self._model.parameters()).device)[None]
        ids = torch.tensor([prompt.ids[start:end]])
        logits = self._forward(prompt.sequences[0].adapter, ids, prompt.cache, inputs)[0]
        prompt.read = end
        return logits

    def _start_generation(self, prompt: _Prompt, logits: Tensor) -> None:
        """Choose the first token of each answer, which then joins its batch."""
        for number, sequence in enumerate(prompt.sequences):
            if sequence.done:
                continue
            sequence.shift = 0 if prompt.images is None else prompt.images.shift
            self.tokens += 1
            if not sequence.take(logits):
                continue
            last = number == len(prompt.sequences) - 1
            cache = prompt.cache if last else deepcopy(prompt.cache)
            # A cache that cannot be joined (sliding windows, recurrent states) gets a batch of its own.
            key = (sequence.adapter, 0 if self._joinable else id(sequence))
            self._batches.setdefault(key, _Batch()).join(sequence, cache, len(prompt.ids))

    def _step(self, key: tuple[str, int]) -> None:
        """Generate one token for each sequence of a batch."""
        batch = self._batches[key]
        batch.leave()
        if not batch.sequences:
            del self._batches[key]
            return
        try:
            ids = torch.tensor([[sequence.last] for sequence in batch.sequences])
            batch.mask = torch.nn.functional.pad(batch.mask, (0, 1), value=1)
            shifts = torch.tensor([[sequence.shift] for sequence in batch.sequences])
            device = next(self._model.parameters()).device
            positions = (batch.mask.sum(-1, keepdim=True) - 1 + shifts).to(device)
            inputs = {"attention_mask": batch.mask.to(device), "position_ids": positions}
            logits = self._forward(key[0], ids, batch.cache, inputs)
            for sequence, row in zip(batch.sequences, logits, strict=True):
                if not sequence.done:
                    sequence.take(row)
                    self.tokens += 1
        except Exception as error:
            log.exception("a step failed")
            for sequence in batch.sequences:
                sequence.fail(first_line(error))
        batch.leave()
        if not batch.sequences:
            del self._batches[key]

    def _forward(self, adapter: str, ids: Tensor, cache: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the logits of the last position, float [batch, vocabulary], on the CPU; the cache grows by `ids`, [batch, new].
        inputs: the model's other inputs, on its device."""
        device = next(self._model.parameters()).device
        with self._speaking(adapter):
            output = self._model(input_ids=ids.to(device), use_cache=True, **{self._cache: cache}, **inputs)
        return output.logits[:, -1].float().cpu()
