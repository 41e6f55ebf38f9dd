"""Keep text that looks like a control token as text.

What somebody wrote in a row may contain `<|im_end|>`. A tokenizer would turn it into the token that ends a turn, so the
row could close its own message and speak in another role. Here such a string becomes the tokens of its characters. The
control tokens that the chat template prints stay, and text without such strings gets the same tokens as ever.

To tell the two apart, each such string in a conversation is replaced, before rendering, by a stand-in: a run of the same
length of a character that the conversation does not contain. A control token in the rendered text is then the template's.
With the strings put back its place is the same, and a control token at any other place is replaced by the tokens of its text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dstune.config.architectures import vision_of
from dstune.core.errors import Problem, UserError
from dstune.data.chat.template import ChatTemplate, RenderError
from dstune.data.frame import Frame
from dstune.data.message import ROLES

_FIRST_STAND_IN = 0x13000
"""Egyptian hieroglyphs. They are letters, which stay as they are when a template prints a value in Python's form; characters
for private use would be escaped."""

_PREFIX_SPACES = "▁Ġ"
"""Characters for the space that some tokenizers put in front of a text."""

_UNKNOWN = "\U0010fffd"
"""A character that is in no vocabulary."""

_OF_IMAGES = re.compile("image|img|vision", re.I)
"""Matches tokens that stand for images, in a model that sees."""

_MADE_UP = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Hi"},
]

NO_TEXT = frozenset({"label", "labels", "tags"})
"""Keys of a row whose values are names, not text. At deeper levels, as in the arguments of a tool, they hold text."""


PIECE = 16384
"""Number of characters that are tokenized at a time to estimate a length."""
CUT = 64
"""Number of tokens that a piece may have in excess because it was cut within a word."""


class TooManyTokens(ValueError):
    """A text has more than `most` tokens."""

    def __init__(self, most: int):
        super().__init__(f"more than {most} tokens")
        self.most = most


@dataclass(frozen=True)
class Defused:
    """A value whose strings hold stand-ins instead of control tokens."""

    value: Any
    strings: tuple[str, ...]
    first: int
    """Code of the character that stands for the first of `strings`."""
    pattern: re.Pattern[str]

    def restore(self, text: str) -> tuple[str, list[int]]:
        """Return `text`, which was rendered from `value`, with the strings put back, and the characters at which the template's
        control tokens begin in it."""
        control_starts = [match.start() for match in self.pattern.finditer(text)]
        for number, string in enumerate(self.strings):
            text = text.replace(chr(self.first + number) * len(string), string)
        return text, control_starts

    def unrestored(self) -> re.Pattern[str]:
        """Return a pattern for stand-ins that `restore` did not recognise because the template cut or escaped them."""
        last = self.first + max(0, len(self.strings) - 1)
        codes = "|".join(json.dumps(chr(code))[1:-1].replace("\\", r"\\") for code in range(self.first, last + 1))
        return re.compile(f"(?:[{chr(self.first)}-{chr(last)}]|{codes})+")


class ControlTokens:
    """The tokens of a transformers tokenizer that no text may produce; picklable.

    These are its special tokens, those of its other added tokens that the chat template prints between messages, and in a model
    that sees its image tokens. Pairs of tags that an answer may contain (`<think>`, `</think>`) are no control tokens, even if
    the template prints them.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        printed = _rendered(tokenizer)
        sees = vision_of(tokenizer) is not None
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        tokens = {
            number: token
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip()
            and (
                token.special
                or (sees and _OF_IMAGES.search(token.content))
                or (token.content in printed and not _is_tag(token.content, added))
            )
        }
        self._ids = frozenset(tokens)
        strings = sorted({token.content for token in tokens.values()}, key=len, reverse=True)
        # A tokenizer that searches normalized text may find a token in upper or lower case.
        ignores_case = any(token.normalized for token in tokens.values())
        self.pattern = re.compile("|".join(map(re.escape, strings)) or r"(?!)", re.I if ignores_case else 0)
        # The token for unknown characters may result from text too.
        self._unknown = self._ids.intersection(self._without_added_tokens(_UNKNOWN) if tokenizer.is_fast else [])

    def first(self, value: Any) -> str:
        """Return the first control token in the strings of `value` (a text, a row, messages); empty if there is none."""
        return next((match.group() for text in _strings(value) if (match := self.pattern.search(text))), "")

    def refuse_across_parts(self, value: Any) -> None:
        """Raise RenderError if parts of one content form a control token only when joined: it would look like the template's."""
        for parts in _contents_in_parts(value):
            if written := _across(self.pattern, parts):
                raise RenderError(f"the parts of a content put together write the control token {written!r}")

    def defuse(self, value: Any) -> Defused:
        """Return `value` with stand-ins for the control tokens in its strings. Raises RenderError as `refuse_across_parts`."""
        self.refuse_across_parts(value)
        control_texts = (match.group() for text in _strings(value) for match in self.pattern.finditer(text))
        strings = tuple(dict.fromkeys(control_texts))
        used = set(json.dumps(value, ensure_ascii=False))
        first = _FIRST_STAND_IN
        while any(chr(first + number) in used for number in range(len(strings))):
            first += len(strings)
        stand_ins = {string: chr(first + number) * len(string) for number, string in enumerate(strings)}
        replaced = _mapped(value, lambda text: self.pattern.sub(lambda match: stand_ins[match.group()], text))
        return Defused(replaced, strings, first, self.pattern)

    def encode(self, text: str, control_starts: list[int] | None = None) -> tuple[list[int], np.ndarray]:
        """Return the tokens of `text`, without special tokens around it, and their offsets: int64 [tokens, 2].

        control_starts: the characters at which intended control tokens begin, in order; all others become text. A slow tokenizer
        has no offsets, so they are empty; UserError is raised if it would have to tell intended control tokens from others.
        """
        if not self._tokenizer.is_fast:
            return self._without_offsets(text, control_starts or []), np.empty((0, 2), dtype=np.int64)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return self.neutral(encoded["input_ids"], encoded["offset_mapping"], text, control_starts or [])

    def neutral(
        self, ids: list[int], offsets: list[tuple[int, int]], text: str, control_starts: list[int]
    ) -> tuple[list[int], np.ndarray]:
        """Return `ids` and `offsets` of `text` with each control token that begins at none of `control_starts` replaced by the
        tokens of its characters."""
        kept_ids: list[int] = []
        kept_offsets: list[tuple[int, int]] = []
        for token, (start, end) in zip(ids, offsets, strict=True):
            after = bisect_left(control_starts, start)
            written = token in self._ids and self.pattern.fullmatch(text[start:end].strip())
            if not written or (after < len(control_starts) and control_starts[after] < end):
                kept_ids.append(token)
                kept_offsets.append((start, end))
                continue
            plain = self._as_text(text[start:end])
            kept_ids += plain
            kept_offsets += [(start, end)] * len(plain)
        return kept_ids, np.array(kept_offsets, dtype=np.int64).reshape(-1, 2)

    def ids(self, text: str, control_starts: list[int] | None = None) -> list[int]:
        """Return the tokens of `text` without special tokens around it, with control tokens only at `control_starts`."""
        if not self.first(text):
            return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.encode(text, control_starts)[0]

    def check_length(self, text: str, most: int) -> None:
        """Raise TooManyTokens if `text` certainly has more than `most` tokens.

        Stops reading as soon as that is certain, since tokenizing megabytes takes minutes. A text that is only slightly too long
        may pass.
        """
        if len(text) <= 4 * most:
            return
        count = 0
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            count += len(self._tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]) - CUT
            if count > most:
                raise TooManyTokens(most)

    def _without_offsets(self, text: str, control_starts: list[int]) -> list[int]:
        written = [match.start() for match in self.pattern.finditer(text)]
        if written == control_starts or not control_starts:
            as_text = written != control_starts
            encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=as_text, verbose=False)
            return encoded["input_ids"]
        reason = "a text holds a control token, and this tokenizer cannot keep it apart from those of the template"
        raise UserError(Problem("model.path", reason, "convert it to a tokenizer.json (a fast tokenizer)"))

    def sequence(self, texts: Sequence[str], max_length: int) -> tuple[list[int], list[int], int]:
        """Return the tokens of one text or of a pair, with the tokenizer's special tokens, cut to at most `max_length`.

        The longer text is shortened first. Also returns the text to which each token belongs (`token_type_ids`, zeros if the
        tokenizer has none), and the number of tokens before the cut.
        """
        parts = [self.ids(text) for text in texts]
        frame = Frame.of(self._tokenizer, len(texts))
        length = frame.size + sum(map(len, parts))
        for _ in range(length - max_length):
            max(parts, key=len)[-1:] = []
        ids, types, _ = frame.around(parts)
        return ids, types, length

    def continued(self, text: str) -> list[int]:
        """Return the tokens of a text that continues another one, without a space in front; it has no added tokens."""
        return self._without_added_tokens(text)

    def _as_text(self, text: str) -> list[int]:
        """Return the tokens of the characters of a control token."""
        for cut in range(len(text)):  # in one piece if possible
            ids = [*self._without_added_tokens(text[:cut]), *self._without_added_tokens(text[cut:])]
            # The vocabulary itself may contain the complete string (`</s>` of SentencePiece).
            if not (self._ids - self._unknown).intersection(ids):
                return ids
        return sorted(self._unknown)

    def _without_added_tokens(self, text: str) -> list[int]:
        """Return the tokens of `text` from the tokenizer's pipeline without its search for added tokens."""
        if not text:
            return []
        backend = self._tokenizer.backend_tokenizer
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = [normal]
        if backend.pre_tokenizer:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]
        if pieces and not text[0].isspace() and text[0] not in _PREFIX_SPACES:
            pieces[0] = pieces[0].lstrip(_PREFIX_SPACES)
        return [token.id for piece in pieces if piece for token in backend.model.tokenize(piece)]


def _is_tag(text: str, added: Collection[str]) -> bool:
    """Return whether a token belongs to a pair such as `<think>` and `</think>`."""
    other = text.replace("</", "<", 1) if text.startswith("</") else text.replace("<", "</", 1)
    return text.startswith("<") and text.endswith(">") and other in added


def _rendered(tokenizer: Any) -> str:
    """Return a made-up conversation as the chat template prints it; empty without a template or if it refuses."""
    if not tokenizer.chat_template:
        return ""
    try:
        return ChatTemplate(tokenizer, None).text(_MADE_UP)
    except (RenderError, UserError):  # such a template is refused elsewhere, with a message
        return ""


def _strings(value: Any, names: Collection[str] = NO_TEXT) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not _is_name(key, item, names):
                yield key
                yield from _strings(item, frozenset())
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, frozenset())


def _contents_in_parts(value: Any) -> Iterator[list[str]]:
    """Yield the texts of each list of several text parts in a value."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _contents_in_parts(item)
    elif isinstance(value, list):
        parts = [item["text"] for item in value if isinstance(item, dict) and isinstance(item.get("text"), str)]
        if len(parts) > 1:
            yield parts
        for item in value:
            yield from _contents_in_parts(item)


def _across(pattern: re.Pattern[str], parts: Sequence[str]) -> str:
    """Return a match of `pattern` across the edge of two parts, joined as templates join them; empty if there is none."""
    for texts in (parts, [part.strip() for part in parts]):
        edges, place = [], 0
        for text in texts:
            place += len(text)
            edges.append(place)
        for match in pattern.finditer("".join(texts)):
            if any(match.start() < edge < match.end() for edge in edges):
                return match.group()
    return ""


def _is_name(key: str, value: Any, names: Collection[str]) -> bool:
    """Return whether a value is a name instead of text: its key is among `names`, or it is the role of a message."""
    return key in names or (key == "role" and value in ROLES)


def _mapped(value: Any, change: Any, names: Collection[str] = NO_TEXT) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key if (is_name := _is_name(key, item, names)) else change(key): item
            if is_name
            else _mapped(item, change, frozenset())
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_mapped(item, change, frozenset()) for item in value]
    return value
