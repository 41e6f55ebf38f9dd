"""Turns the tokens of an answer into text piece by piece, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dstune.generation.sampler import Chosen

MOST_UNFINISHED = 64
"""The most tokens that are decoded together while they do not form a complete character."""


@dataclass
class Piece:
    """Text that can be sent, its tokens, and how the answer ended, if it has."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    finish: str | None = None
    """`stop` (the model's end token, or a stop text), `length`, or `error`."""
    error: str = ""


class TextStream:
    """Turns tokens into pieces. Incomplete characters, and text that may be the start of a stop text, are held back; the stop text
    itself is not sent."""

    def __init__(self, decode: Callable[[Sequence[int]], str], ends: frozenset[int], stop: tuple[str, ...], limit: int):
        """ends: tokens that end an answer. limit: the most tokens of an answer."""
        self._decode, self._ends, self._stop, self._limit = decode, ends, stop, limit
        self._ids: list[int] = []
        self._start = self._decoded = 0  # token offsets between which the last text was decoded
        self._pending = ""
        self._waiting: list[tuple[Chosen, int]] = []  # each with the characters of `_pending` before it
        self.count = 0
        self.finished = False

    @property
    def ids(self) -> list[int]:
        """The tokens of the answer so far, without the end token."""
        return [*self._ids]

    def push(self, chosen: Chosen) -> Piece:
        """Return the piece that the next token completes; empty if nothing can be sent yet."""
        self.count += 1
        if chosen.token in self._ends:
            return self._end("stop")
        self._ids.append(chosen.token)
        self._waiting.append((chosen, len(self._pending)))
        self._pending += self._new_text()
        stop_start = min((at for stop in self._stop if (at := self._pending.find(stop)) >= 0), default=-1)
        if stop_start >= 0:
            self.finished = True
            tokens = [token for token, text_length in self._waiting if text_length < stop_start]
            return Piece(self._pending[:stop_start], tokens, "stop")
        if self.count >= self._limit:
            return self._end("length")
        safe = len(self._pending) - self._overlap()
        piece = Piece(self._pending[:safe])
        self._pending = self._pending[safe:]
        if not self._pending:
            piece.tokens = [token for token, _ in self._waiting]
            self._waiting = []
        elif safe:
            piece.tokens = [token for token, text_length in self._waiting if text_length < safe]
            self._waiting = [(token, text_length - safe) for token, text_length in self._waiting if text_length >= safe]
        return piece

    def _end(self, finish: str) -> Piece:
        self.finished = True
        self._pending += self._new_text(last=True)
        stop_start = min((at for stop in self._stop if (at := self._pending.find(stop)) >= 0), default=-1)
        if stop_start >= 0:
            finish, self._pending = "stop", self._pending[:stop_start]
        return Piece(self._pending, [token for token, _ in self._waiting], finish)

    def _new_text(self, *, last: bool = False) -> str:
        text_before = self._decode(self._ids[self._start : self._decoded])
        decoded = self._decode(self._ids[self._start :])
        # A character has at most four bytes. What still has no text then (invalid bytes, control tokens) never gets one, and
        # decoding more and more of it with each token would take quadratic time.
        unfinished = len(decoded) <= len(text_before) or decoded.endswith("\N{REPLACEMENT CHARACTER}")
        if not last and unfinished and len(self._ids) - self._decoded < MOST_UNFINISHED:
            return ""
        self._start, self._decoded = self._decoded, len(self._ids)
        return decoded[len(text_before) :]

    def _overlap(self) -> int:
        """Return how many characters at the end of the pending text may begin a stop text."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:size]):
                    longest = size
                    break
        return longest
