"""The state of generation in the local engine: answers, prompts that are being prefilled, and batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dstune.core.errors import first_line
from dstune.serve.engines.local.caches import join_caches, map_cache, pad_cache
from dstune.serve.engines.local.model import ImageInputs
from dstune.serve.engines.local.sampling import Sampler, Sampling
from dstune.serve.engines.local.text import Piece, TextStream

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
        self.position_shift = 0
        """Offset of its next position from its token count: an image has more or fewer positions than tokens."""
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


class Batch:
    """Sequences of one adapter that are generated together, padded on the left."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.cache: Any = None
        self.mask = torch.empty(0, 0, dtype=torch.long)

    def join(self, sequence: Sequence, cache: Any, length: int) -> None:
        """Add a sequence. cache: of its prompt, which has `length` tokens."""
        mask = torch.ones(1, length, dtype=torch.long)
        if not self.sequences:
            self.cache, self.mask = cache, mask
        else:
            width = max(length, self.mask.shape[1])
            self.cache = join_caches(pad_cache(self.cache, width), pad_cache(cache, width))
            pad = torch.nn.functional.pad
            self.mask = torch.cat([pad(rows, (width - rows.shape[1], 0)) for rows in (self.mask, mask)])
        self.sequences.append(sequence)

    def remove_finished(self) -> None:
        """Remove the finished sequences, and the columns that are padding for all others."""
        remaining = [number for number, sequence in enumerate(self.sequences) if not sequence.is_done]
        if len(remaining) == len(self.sequences):
            return
        self.sequences = [self.sequences[number] for number in remaining]
        if not remaining:
            self.cache = None
            return
        rows = torch.tensor(remaining)
        self.mask = self.mask[rows]
        first = int(self.mask.argmax(-1).min())  # the first column that is not padding for all
        self.mask = self.mask[:, first:]
        self.cache = map_cache(self.cache, lambda tensor: tensor[rows.to(tensor.device), :, first:])
