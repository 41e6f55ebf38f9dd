"""The computing thread of the local engine: continuous batching, in which sequences join and leave a batch between two tokens.

A forward pass uses one adapter, so each adapter has its own batch, and the thread runs one step of each batch in turn. New prompts
are prefilled in chunks between the steps, so that a long one does not stop the others.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from dstune.core.errors import first_line
from dstune.generation.answers import placed_images
from dstune.generation.batch import Batch, last_logits
from dstune.generation.cache import is_joinable, new_cache
from dstune.serve.engines.local.model import ImageInputs
from dstune.serve.engines.local.sequences import Prompt, Running, Sequence

log = logging.getLogger("dstune.serve")


class QueueFull(Exception):
    """The queue has no room for this prompt."""


class Scheduler:
    """The computing thread. Its methods may be called from any thread."""

    def __init__(
        self,
        model: Any,
        use_adapter: Callable[[str], AbstractContextManager[Any]],
        *,
        max_sequences: int = 16,
        max_waiting: int = 64,
        max_cached_tokens: int = 65536,
        chunk: int = 512,
        max_image_bytes: int = 2**30,
        on_failure: Callable[[], None] = lambda: None,
    ):
        """use_adapter: context manager that activates an adapter on the model.

        max_cached_tokens: of all sequences together, counted at their maximum length. chunk: the most tokens of a prompt that are
        prefilled at once. max_image_bytes: of the image inputs of all waiting prompts. on_failure: called by the thread if it ends
        with a fault.
        """
        self._model, self._use_adapter = model, use_adapter
        self._max_sequences, self._max_waiting = max_sequences, max_waiting
        self._max_cached_tokens, self._chunk, self._max_image_bytes = max_cached_tokens, chunk, max_image_bytes
        self._has_joinable_caches = is_joinable(model)
        # Models with image positions reuse those of the previous prompt unless positions are passed.
        self._remembers_positions = any(hasattr(module, "rope_deltas") for module in model.modules())
        self._waiting: deque[Prompt] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._prefilling: Prompt | None = None
        self._running: dict[tuple[str, int], Running] = {}
        """By adapter and 0; by adapter and a number of its own for an answer whose cache cannot join others."""
        self._changed = threading.Condition()
        self._stopped = self._broken = False
        self._on_failure = on_failure
        self.tokens = 0
        """Tokens that were generated since the start."""
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def submit(self, sequences: list[Sequence], client: str = "", images: ImageInputs | None = None) -> None:
        """Queue the answers to one prompt, which may contain images.

        Prompts of several clients are prefilled in turn, and one client may take three quarters of the queue. Raises QueueFull;
        ValueError if the answers can never fit.
        """
        prompt = Prompt(sequences, client, images=images)
        self.refuse_large(prompt.max_length, len(sequences))
        with self._changed:
            if len(self._waiting) >= self._max_waiting:  # prompts whose clients have disconnected do not count
                self._waiting = deque(waiting for waiting in self._waiting if not waiting.is_done)
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
        """Return whether image inputs of `size` bytes fit into memory beside those of other prompts; always true if there are none.

        The others are the waiting prompts, and prompts with `unsubmitted` bytes that are not submitted yet.
        """
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
    def is_alive(self) -> bool:
        """Whether the thread still computes."""
        return self._thread.is_alive() and not self._stopped

    def state(self) -> dict[str, int]:
        """Return the numbers of waiting prompts, of running answers, and of tokens generated since the start."""
        with self._changed:
            running = len(self._running_sequences())
            return {"waiting": len(self._waiting), "running": running, "tokens": self.tokens}

    def adapters(self) -> set[str]:
        """Return the adapters of running and waiting answers."""
        with self._changed:
            waiting_adapters = {sequence.adapter for prompt in self._prompts() for sequence in prompt.sequences}
            return waiting_adapters | {adapter for adapter, _ in self._running}

    def stop(self) -> None:
        """Stop the thread after the current step. Unfinished sequences fail."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def give_up(self) -> None:
        """Make the computing thread end with a fault after the current call. Only that thread may call it."""
        self._broken = True

    # -- the thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._run_calls()
                    if self._broken:
                        raise RuntimeError("the model is damaged")
                    self._prefill()
                    for key in list(self._running):
                        self._step(key)
        except BaseException:
            log.exception("the computing thread has ended")
            self._stopped = True
            self._on_failure()
        with self._changed:
            self._stopped = True
        for sequence in self._all_sequences():
            sequence.fail("the engine is stopping")
        for _, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError("the engine is stopping"))

    def _prompts(self) -> list[Prompt]:
        """Return the prompts that no answer has started for."""
        return [*self._waiting, *([self._prefilling] if self._prefilling else [])]

    def _running_sequences(self) -> list[Sequence]:
        return [sequence for running in self._running.values() for sequence in running.sequences]

    def _all_sequences(self) -> list[Sequence]:
        return [sequence for prompt in self._prompts() for sequence in prompt.sequences] + self._running_sequences()

    def _wait(self) -> bool:
        """Wait until there is work. Returns False if the thread has to stop."""
        with self._changed:
            while not (self._stopped or self._calls or self._waiting or self._prefilling or self._running):
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

    def _prefill(self) -> None:
        """Prefill one chunk of the current prompt, or of the next one that fits."""
        if self._prefilling is None:
            self._pop_prompt()
        prompt = self._prefilling
        if prompt is None:
            return
        if prompt.is_done:
            self._prefilling = None
            return
        try:
            if prompt.cache is None:
                prompt.cache = new_cache(self._model, plain=self._has_joinable_caches)
            logits = self._prefill_chunk(prompt)
            if prompt.prefilled < len(prompt.ids):
                return
            self._prefilling = None
            self._start_generation(prompt, logits)
        except Exception as error:
            log.exception("a prompt could not be prefilled")
            self._prefilling = None
            for sequence in prompt.sequences:
                sequence.fail(first_line(error))

    def _pop_prompt(self) -> None:
        """Move the next prompt from the queue to `_prefilling`, if its answers fit beside the running ones. Each counts at its
        maximum length."""
        with self._changed:
            while self._waiting and self._waiting[0].is_done:
                self._waiting.popleft()
            if not self._waiting:
                return
            running, prompt = self._running_sequences(), self._waiting[0]
            has_room = (
                len(running) + len(prompt.sequences) <= self._max_sequences
                and sum(sequence.max_length for sequence in running) + prompt.max_length <= self._max_cached_tokens
            )
            if has_room or not running:
                self._prefilling = self._waiting.popleft()

    def _prefill_chunk(self, prompt: Prompt) -> Tensor:
        """Return the logits after the next chunk of a prompt.

        The first chunk extends to the end of the last image: a model takes all images of a prompt at once, and lets the tokens of
        some attend to each other.
        """
        start, end = prompt.prefilled, min(prompt.prefilled + self._chunk, len(prompt.ids))
        device, inputs, positions = self._device, dict[str, Any](), None
        if prompt.images is not None:
            end = max(end, prompt.images.last)
            inputs = placed_images(prompt.images.inputs_for(start, end), self._model)
            positions = inputs.pop("position_ids", None)
        if self._remembers_positions and positions is None:
            positions = torch.arange(start, end, device=device)[None]
        ids = torch.tensor([prompt.ids[start:end]], device=device)
        with self._use_adapter(prompt.sequences[0].adapter):
            logits = last_logits(self._model, ids, None, positions, prompt.cache, **inputs)
        prompt.prefilled = end
        return logits[0].float().cpu()

    def _start_generation(self, prompt: Prompt, logits: Tensor) -> None:
        """Choose the first token of each answer; those that go on join the running ones of their adapter."""
        starting = []
        for sequence in prompt.sequences:
            if not sequence.is_done:
                self.tokens += 1
                if sequence.add_token(logits):
                    starting.append(sequence)
        if not starting:
            return
        length, shift = len(prompt.ids), 0 if prompt.images is None else prompt.images.shift
        mask = torch.ones(1, length, dtype=torch.long, device=self._device)
        positions, adapter = torch.full_like(mask[:, :1], length + shift), starting[0].adapter
        if not self._has_joinable_caches:  # a recurrent state: each answer is generated alone
            for sequence in starting:
                cache = prompt.cache if sequence is starting[-1] else deepcopy(prompt.cache)
                running = Running([sequence], Batch(self._model, cache, mask, positions))
                self._running[adapter, id(sequence)] = running
            return
        batch = Batch(self._model, prompt.cache, mask, positions)
        batch.repeat(len(starting))
        if (adapter, 0) in self._running:
            self._running[adapter, 0].join(starting, batch)
        else:
            self._running[adapter, 0] = Running(starting, batch)

    def _step(self, key: tuple[str, int]) -> None:
        """Generate one token for each running sequence of an adapter."""
        running = self._running[key]
        running.remove_finished()
        if not running.sequences:
            del self._running[key]
            return
        try:
            tokens = torch.tensor([sequence.last_token for sequence in running.sequences], device=self._device)
            with self._use_adapter(key[0]):
                logits = running.batch.step(tokens).float().cpu()
            for sequence, row in zip(running.sequences, logits, strict=True):
                if not sequence.is_done:
                    sequence.add_token(row)
                    self.tokens += 1
        except Exception as error:
            log.exception("a step failed")
            for sequence in running.sequences:
                sequence.fail(first_line(error))
        running.remove_finished()
        if not running.sequences:
            del self._running[key]

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device
