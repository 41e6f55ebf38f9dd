"""Samples of language models: every token has a label, the token itself or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from dstune.data.collate import NO_TARGET
from dstune.data.control import ControlTokens
from dstune.data.preferences import as_chat
from dstune.data.render import ChatRenderer, RenderError, Span, require_offsets, target_mask
from dstune.data.special_tokens import first_special_tokens
from dstune.data.tokenize.sample import Encoder, Rows, Sample
from dstune.errors import Problem, UserError


class Language(Encoder):
    """What chats and documents have in common. Raises UserError (at creation) without an end-of-sequence token.

    `bytes` is the length in UTF-8 of the text that a sample's targets stand for, special tokens apart; 0 where the tokenizer
    cannot tell.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        self._end = self._end_of(tokenizer)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._control = ControlTokens(tokenizer)
        self._prefix = first_special_tokens(tokenizer)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = np.array(sorted({*tokenizer.all_special_ids, *added}), dtype=np.int64)

    @staticmethod
    def _end_of(tokenizer: Any) -> int:
        """The token behind a text."""
        if tokenizer.eos_token_id is None:
            raise UserError(
                Problem(
                    where="model.path",
                    reason="the tokenizer has no end-of-sequence token, so the model could not learn to stop",
                    fix="choose a model made to generate text",
                )
            )
        return int(tokenizer.eos_token_id)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"labels": datasets.List(datasets.Value("int32")), "bytes": datasets.Value("int64")}

    def plain_prompt_ids(self, text: str) -> list[int]:
        """Tokens of a text that the model is to continue: with the first special tokens, without an end."""
        ids = self._control.ids(text, self._own_tokens(text, end=None))
        return [*self._missing_prefix(ids), *ids]

    def _sample(
        self, number: int, input_ids: np.ndarray, targets: np.ndarray, sizes: np.ndarray, problem: str
    ) -> Sample:
        """sizes: bytes of text that each token stands for."""
        targets[:1] = False  # nothing precedes the first token, so nothing predicts it
        labels = np.where(targets, input_ids, NO_TARGET).astype(np.int32)
        if not problem and not targets.any():
            problem = "no trainable token"
        length = len(input_ids)
        kept = slice(0, self._max_length)
        counted = labels[kept] != NO_TARGET
        columns = {"labels": labels[kept], "bytes": int(sizes[kept][counted].sum())}
        weight = int(np.count_nonzero(counted))
        return Sample(number, input_ids[kept], columns, weight, length > self._max_length, problem, length)

    def _sizes(self, ids: np.ndarray, offsets: Any, text: str) -> np.ndarray:
        """Bytes of `text` that each token stands for: those behind the token before it, to its own end."""
        if not len(ids) or len(offsets) != len(ids):
            return np.zeros(len(ids), dtype=np.int64)
        byte_at = np.zeros(len(text) + 1, dtype=np.int64)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF), out=byte_at[1:])
        # The tokens of one character have the same end: the first one counts its bytes, the others none.
        ends = np.maximum.accumulate(byte_at[np.asarray(offsets, dtype=np.int64)[:, 1]])
        sizes = np.diff(ends, prepend=0)
        sizes[np.isin(ids, self._special)] = 0
        return sizes

    def _own_tokens(self, text: str, end: str | None) -> list[int]:
        """Where a document has a first special token, or an `end`, that it would get anyway: there they are no text."""
        first = [0] if self._prefix and text.startswith(self._tokenizer.decode(self._prefix)) else []
        return [*first, *([len(text) - len(end)] if end and text.endswith(end) else [])]

    def _missing_prefix(self, ids: list[int]) -> list[int]:
        """The first special tokens, unless the text brought them itself."""
        return [] if ids[: len(self._prefix)] == self._prefix else self._prefix


class ChatEncoder(Language):
    """Prompts and completions go through the chat template if the model has one, else one follows the other."""

    def __init__(
        self, tokenizer: Any, template_date: str | None, fmt: str, max_length: int, *, train_on_prompt: bool = False
    ):
        require_offsets(tokenizer)
        if fmt == "messages" or tokenizer.chat_template:
            self.renderer = ChatRenderer(tokenizer, template_date)
        self._train_on_prompt = train_on_prompt
        super().__init__(tokenizer, max_length)

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        texts: list[str] = []
        spans: list[list[Span]] = []
        problems: list[str] = []
        own: list[list[int] | None] = []
        for row in rows:
            defused = self._control.defuse(row) if self._control.first(row) else None
            text, found, problem = self._render(defused.value if defused else row)
            text, template_tokens = defused.restore(text) if defused else (text, None)
            texts.append(text)
            spans.append(found)
            problems.append(problem)
            own.append(template_tokens)
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        samples = []
        for number, ids, offsets, text, template_tokens, row_spans, problem in zip(
            numbers, encoded["input_ids"], encoded["offset_mapping"], texts, own, spans, problems, strict=True
        ):
            if template_tokens is not None:
                ids, offsets = self._control.neutral(ids, offsets, text, template_tokens)
            input_ids = np.array(ids, dtype=np.int32)
            sizes = self._sizes(input_ids, offsets, text)
            if self._train_on_prompt and self.renderer is None:
                targets = np.ones(len(input_ids), dtype=bool)
            else:
                targets = target_mask(np.array(offsets, dtype=np.int64).reshape(-1, 2), row_spans)
            if self.renderer is None:
                prefix = self._missing_prefix(ids)
                input_ids = np.array([*prefix, *ids, self._end], dtype=np.int32)
                targets = np.concatenate([np.full(len(prefix), self._train_on_prompt), targets, [True]])
                sizes = np.concatenate([np.zeros(len(prefix), dtype=np.int64), sizes, [0]])
            samples.append(self._sample(number, input_ids, targets, sizes, problem))
        return samples

    def _render(self, row: dict[str, Any]) -> tuple[str, list[Span], str]:
        """The text of a row, the characters of it that are targets, and what is wrong with the row, if anything."""
        if self.renderer is None:
            text = row["prompt"] + row["completion"]
            return text, [(len(row["prompt"]), len(text))], ""
        try:
            if self._train_on_prompt:
                # Everything but what has the weight 0.
                text, left_out = self.renderer.spans(conversation(row), tools=row.get("tools"), weight=0)
                return text, _between(left_out, len(text)), ""
            return *self.renderer.spans(conversation(row), tools=row.get("tools")), ""
        except RenderError as error:
            return "", [], str(error)


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a chat row; a prompt and its completion are one exchange. Of a pair those of the better answer."""
    if "chosen" in row:
        row = as_chat(row, "chosen")
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _between(spans: list[Span], length: int) -> list[Span]:
    """What `spans` leave of a text of `length` characters, a token without characters at its end included."""
    edges = [0, *(edge for span in spans for edge in span), length + 1]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
