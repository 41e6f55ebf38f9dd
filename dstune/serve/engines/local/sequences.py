"""The state of generation in the local engine: answers, prompts that are being prefilled, and answers that are generated
together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dstune.core.errors import first_line
from dstune.generation.batch import Batch
from dstune.generation.sampler import Sampler, Sampling
from dstune.generation.text import Piece, TextStream
from dstune.serve.engines.local.model import ImageInputs

log = logging.getLogger("dstune.serve")


class Sequence:
    """One answer that is being generated."""

    def __init__(
        self, prompt: list[int], sampling: Sampling, stream: TextStream, emit: Callable[[Piece], None], adapter: str
    ):
        """emit: called by the computing thread with each piece of text."""
        self.prompt, self.stream, self.emit, self.adapter = prompt, stream, emit, adapter
        self.sampler = Sampler(sampling, prompt)
        self.last_token = prompt[-1]
        self.cancelled = False

    @property
    def is_done(self) -> bool:
        return self.cancelled or self.stream.finished

    @property
    def max_length(self) -> int:
        """The most cache positions that the prompt and the answer can take."""
        return len(self.prompt) + self.sampler.sampling.max_tokens

    def add_token(self, logits: Tensor) -> bool:
        """Choose a token and emit the text that it completes. Returns whether the answer continues.

        logits: float [vocabulary]. An error ends this answer alone.
        """
        try:
            chosen = self.sampler.choose(logits)
            piece = self.stream.push(chosen)
        except Exception as error:
            log.exception("a token could not be chosen")
            self.fail(first_line(error))
            return False
        self.last_token = chosen.token
        if piece.text or piece.tokens or piece.finish:
            self.emit(piece)
        return not self.is_done

    def fail(self, reason: str) -> None:
        """End the answer with an error, unless it has ended already."""
        if not self.is_done:
            self.stream.finished = True
            self.emit(Piece(finish="error", error=reason))


@dataclass
class Prompt:
    """A prompt that is being prefilled, for one or more answers."""

    sequences: list[Sequence]
    client: str = ""
    turn: int = 0
    """Its place among the prompts of its client: waiting prompts are prefilled in the order of their turns."""
    images: ImageInputs | None = None
    cache: Any = None
    prefilled: int = 0
    """How many of its tokens are in the cache."""

    @property
    def image_bytes(self) -> int:
        return 0 if self.images is None else self.images.bytes

    @property
    def ids(self) -> list[int]:
        return self.sequences[0].prompt

    @property
    def is_done(self) -> bool:
        return all(sequence.is_done for sequence in self.sequences)

    @property
    def max_length(self) -> int:
        """The most cache positions that these answers can take together."""
        return sum(sequence.max_length for sequence in self.sequences)


class Running:
    """Answers of one adapter that are generated together."""

    def __init__(self, sequences: list[Sequence], batch: Batch):
        """batch: has a row for each sequence."""
        self.sequences, self.batch = sequences, batch

    def join(self, sequences: list[Sequence], batch: Batch) -> None:
        self.sequences += sequences
        self.batch.join(batch)

    def remove_finished(self) -> None:
        """Remove the finished sequences and, if others remain, their rows."""
        remaining = [number for number, sequence in enumerate(self.sequences) if not sequence.is_done]
        if remaining and len(remaining) < len(self.sequences):
            self.batch.keep(remaining)
        self.sequences = [self.sequences[number] for number in remaining]
