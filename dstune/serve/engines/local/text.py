"""Tokens of an answer to text, piece by piece, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dstune.serve.engines.local.sampling import Chosen

MOST_UNFINISHED = 64
"""Tokens that are decoded together while they are no whole character."""


@dataclass
class Piece:
    """Text that can be shown, the tokens that gave it, and how the answer ended, if it did."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    finish: str | None = None
    """`stop` (the model's own end, or a stop text), `length`, or `error`."""
    error: str = ""


class TextStream:
    """Turns tokens into pieces. Text that may be the start of a stop text is held back, and characters that are not
    complete yet; the stop text itself is not shown."""

    def __init__(self, decode: Callable[[Sequence[int]], str], ends: frozenset[int], stop: tuple[str, ...], limit: int):
        """ends: tokens that end an answer. limit: most tokens of an answer."""
        self._decode, self._ends, self._stop, self._limit = decode, ends, stop, limit
        self._ids: list[int] = []
        self._start = self._decoded = 0  # tokens: from where the last text was decoded, and up to where it was
        self._held = ""
        self._waiting: list[tuple[Chosen, int]] = []  # with the characters in `_held` in front of each
        self.count = 0
        self.finished = False

    @property
    def ids(self) -> list[int]:
        """The tokens of the answer so far, without the one that ended it."""
        return [*self._ids]

    def push(self, chosen: Chosen) -> Piece:
        """Return the piece that the next token completes; empty where nothing can be shown yet."""
        self.count += 1
        if chosen.token in self._ends:
            return self._end("stop")
        self._ids.append(chosen.token)
        self._waiting.append((chosen, len(self._held)))
        self._held += self._new_text()
        stop_start = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=-1)
        if stop_start >= 0:
            self.finished = True
            tokens = [token for token, text_length in self._waiting if text_length < stop_start]
            return Piece(self._held[:stop_start], tokens, "stop")
        if self.count >= self._limit:
            return self._end("length")
        safe = len(self._held) - self._overlap()
        piece = Piece(self._held[:safe])
        self._held = self._held[safe:]
        if not self._held:
            piece.tokens = [token for token, _ in self._waiting]
            self._waiting = []
        elif safe:
            piece.tokens = [token for token, text_length in self._waiting if text_length < safe]
            self._waiting = [(token, text_length - safe) for token, text_length in self._waiting if text_length >= safe]
        return piece

    def _end(self, finish: str) -> Piece:
        self.finished = True
        self._held += self._new_text(last=True)
        stop_start = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=-1)
        if stop_start >= 0:
            finish, self._held = "stop", self._held[:stop_start]
        return Piece(self._held, [token for token, _ in self._waiting], finish)

    def _new_text(self, *, last: bool = False) -> str:
        text_before = self._decode(self._ids[self._start : self._decoded])
        now = self._decode(self._ids[self._start :])
        # A character has four bytes at most. What has still no text then (bytes that are none, control tokens) never gets one, and
        # decoding more and more of it with each token would take the square of the answer.
        unfinished = len(now) <= len(text_before) or now.endswith("\N{REPLACEMENT CHARACTER}")
        if not last and unfinished and len(self._ids) - self._decoded < MOST_UNFINISHED:
            return ""
        self._start, self._decoded = self._decoded, len(self._ids)
        return now[len(text_before) :]

    def _overlap(self) -> int:
        """Return characters at the end of what is held that a stop text may begin with."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
