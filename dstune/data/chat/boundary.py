"""Check that a target begins between two tokens: a server tokenizes the prompt alone, and the model continues from there."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from dstune.data.chat.rule import alternatives
from dstune.data.control import ControlTokens


class BoundaryError(ValueError):
    """A text cannot be tokenized in two pieces that decode to the same text."""


class Boundaries:
    """Compares the tokens of a text with those of its beginning alone; picklable.

    A tokenizer splits a text at added tokens first, so only the part after the last added token has to be compared.

    In all methods, control_starts are the characters at which the template's control tokens begin; with None, all control tokens
    are the template's. Token arrays are int32 [tokens], offsets (first and last character, exclusive) int64 [tokens, 2].
    """

    def __init__(self, tokenizer: Any, control: ControlTokens):
        self._tokenizer, self._control = tokenizer, control
        self._added = np.array(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
        self._pattern = alternatives(token.content for token in tokenizer.added_tokens_decoder.values())
        self._ids_by_text: dict[str, list[int]] = {}

    def is_clean(
        self, text: str, ids: np.ndarray, offsets: np.ndarray, start: int, control_starts: list[int] | None
    ) -> bool:
        """Return whether `ids` begin with the tokens of `text[:start]` alone."""
        count = int(np.searchsorted(offsets[:, 1], start, side="right"))
        # Tokens of white space may have empty offsets; they belong to the text before them.
        if count < len(ids) and offsets[count, 0] < start:
            return False
        if control_starts is None:
            added = np.flatnonzero(np.isin(ids[:count], self._added))
            first = int(added[-1]) if len(added) else 0
            begin = int(offsets[first, 0]) if len(added) else 0
            if self._tokens(text[begin:start]) == ids[first:count].tolist():
                return True
        return self._encode(text[:start], control_starts)[0] == ids[:count].tolist()

    @staticmethod
    def cuts_token(offsets: np.ndarray, at: int) -> bool:
        """Return whether a token has characters on both sides of `at`."""
        first = int(np.searchsorted(offsets[:, 1], at, side="right"))
        return first < len(offsets) and bool(offsets[first, 0] < at)

    def until(
        self, text: str, start: int, end: int, control_starts: list[int] | None
    ) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Return the tokens of `text[:end]`, their offsets, and the number of tokens of `text[:start]`; None if the former do not
        begin with the latter."""
        ids, offsets = self._encode(text[:end], control_starts)
        head, _ = self._encode(text[:start], control_starts)
        if ids[: len(head)] != head:
            return None
        return np.array(ids, dtype=np.int32), np.asarray(offsets, dtype=np.int64).reshape(-1, 2), len(head)

    def apart(
        self, text: str, ids: np.ndarray, start: int, end: int, control_starts: list[int] | None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the tokens of `text[:start]` followed by those of `text[start:end]`, their offsets, and the number of the former.

        ids: tokens of the complete text. Raises BoundaryError if they decode to a different text.
        """
        head, head_offsets = self._encode(text[:start], control_starts)
        whole = self._decode(ids.tolist())
        pieces = [
            self._behind_token(text[start:end], control_starts, start),
            self._inside_word(text[start:end], control_starts, start),
        ]
        # A tokenizer that merges two spaces into one decodes the whole with fewer than its pieces: the last try allows for that.
        for (tail, offsets), normalise in ((pieces[0], str), (pieces[1], str), (pieces[1], _single_spaces)):
            joined = [*head, *tail]
            if normalise(whole).startswith(normalise(self._decode(joined))):
                return np.array(joined, dtype=np.int32), np.concatenate([head_offsets, offsets + start]), len(head)
        raise BoundaryError(
            "the answer begins inside a token of the whole text, and the tokenizer cannot write it apart"
        )

    def _behind_token(self, text: str, control_starts: list[int] | None, start: int) -> tuple[list[int], np.ndarray]:
        """Return the tokens and offsets of `text` as it is tokenized after an added token."""
        anchor = self._tokenizer.eos_token
        behind = (
            None if control_starts is None else [0, *(at - start + len(anchor) for at in control_starts if at >= start)]
        )
        ids, offsets = self._encode(anchor + text, behind)
        return ids[1:], offsets[1:] - len(anchor)

    def _inside_word(self, text: str, control_starts: list[int] | None, start: int) -> tuple[list[int], np.ndarray]:
        """Return the tokens and offsets of `text` without the space that the tokenizer would put in front of it."""
        match = self._pattern.search(text)
        length = match.start() if match else len(text)
        first = self._control.continued(text[:length])
        tail, tail_offsets = self._behind_token(text[length:], control_starts, start + length)
        offsets = np.array([(0, length)] * len(first), dtype=np.int64).reshape(-1, 2)
        return [*first, *tail], np.concatenate([offsets, tail_offsets + length])

    def _encode(self, text: str, control_starts: list[int] | None) -> tuple[list[int], np.ndarray]:
        """Return the tokens of `text` and their offsets."""
        if control_starts is None:
            control_starts = [match.start() for match in self._control.pattern.finditer(text)]
        return self._control.encode(text, [at for at in control_starts if at < len(text)])

    def _tokens(self, text: str) -> list[int]:
        if text not in self._ids_by_text:
            if len(self._ids_by_text) > 1000:
                self._ids_by_text.clear()
            self._ids_by_text[text] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._ids_by_text[text]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _single_spaces(text: str) -> str:
    return re.sub(" +", " ", text)
