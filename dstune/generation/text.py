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
        self._pending = ""  # text that has not been sent
        self._unsent: list[tuple[Chosen, int]] = []  # its tokens, each with the place in `_pending` at which it begins
        self.count = 0
        """Tokens so far, with the end token."""
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
        self._unsent.append((chosen, len(self._pending)))
        self._pending += self._new_text()
        if (stop_start := self._find_stop()) is not None:
            self.finished = True
            tokens = [token for token, start in self._unsent if start < stop_start]
            return Piece(self._pending[:stop_start], tokens, "stop")
        if self.count >= self._limit:
            return self._end("length")
        safe = len(self._pending) - self._overlap()
        piece = Piece(self._pending[:safe])
        self._pending = self._pending[safe:]
        if not self._pending:
            piece.tokens = [token for token, _ in self._unsent]
            self._unsent = []
        elif safe:
            piece.tokens = [token for token, start in self._unsent if start < safe]
            self._unsent = [(token, start - safe) for token, start in self._unsent if start >= safe]
        return piece

    def _end(self, finish: str) -> Piece:
        """Return the last piece, with all that was held back."""
        self.finished = True
        self._pending += self._new_text(last=True)
        if (stop_start := self._find_stop()) is not None:
            finish, self._pending = "stop", self._pending[:stop_start]
        return Piece(self._pending, [token for token, _ in self._unsent], finish)

    def _find_stop(self) -> int | None:
        """Return where the first stop text begins in the pending text, or None."""
        starts = (self._pending.find(stop) for stop in self._stop)
        return min((start for start in starts if start >= 0), default=None)

    def _new_text(self, *, last: bool = False) -> str:
        """Return the text that the tokens since the last call complete; empty while a character is incomplete. last: incomplete
        characters are returned too."""
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
