"""Rows to token ids and labels: what one process of `datasets.map` runs on a batch of rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dstune.config.data_schema import DataFormat
from dstune.config.task_schema import CausalLmConfig, ChatConfig, ClassificationConfig, TaskConfig
from dstune.data.collate import NO_TARGET
from dstune.data.control import ControlTokens
from dstune.data.render import ChatRenderer, RenderError, Span, require_offsets, target_mask
from dstune.data.rows import labels_of
from dstune.errors import Problem, UserError

Rows = list[dict[str, Any]]
"""Normalised rows, as `rows.normalise` gives them."""


@dataclass
class Sample:
    """One tokenized sample, or the reason why the row gives none."""

    row: int
    """Number of the row that it came from."""
    input_ids: np.ndarray
    labels: np.ndarray
    truncated: bool = False
    problem: str = ""
    length: int = 0
    """Tokens before truncation."""
    segments: np.ndarray | None = None
    """Which of two texts each token belongs to, for models that are told (token_type_ids)."""


class RowTokenizer:
    """Tokenizes rows for one task; picklable, so that it travels to the processes of `datasets.map`.

    tokenizer: of transformers. max_length: tokens kept of a row. labels: label names by index (classification).
    Prompts and completions go through the chat template if the model has one, else one follows the other. Control tokens
    in what a row says are encoded as text (see `control`).
    Raises UserError (at creation) if the tokenizer lacks what task and format need.
    """

    def __init__(
        self, tokenizer: Any, task: TaskConfig, fmt: DataFormat, max_length: int, labels: tuple[str, ...] = ()
    ):
        self._tokenizer = tokenizer
        self._task = task
        self._max_length = max_length
        self._label_ids = {label: index for index, label in enumerate(labels)}
        self._classified_task = isinstance(task, ClassificationConfig)
        self._multi_label = isinstance(task, ClassificationConfig) and task.multi_label
        # For a single text every segment is 0, which is what a model takes where none is given.
        self._with_segments = fmt is DataFormat.pair and "token_type_ids" in tokenizer.model_input_names
        self._train_on_prompt = isinstance(task, ChatConfig) and task.train_on_prompt
        self._control = ControlTokens(tokenizer)
        self.renderer: ChatRenderer | None = None
        if isinstance(task, ChatConfig):
            require_offsets(tokenizer)
            if fmt is DataFormat.messages or tokenizer.chat_template:
                self.renderer = ChatRenderer(tokenizer, task.template_date)
        if not isinstance(task, ClassificationConfig) and tokenizer.eos_token_id is None:
            raise UserError(
                Problem(
                    where="model.path",
                    reason="the tokenizer has no end-of-sequence token, so the model could not learn to stop",
                    fix="choose a model made to generate text",
                )
            )
        self._prefix = _first_special_tokens(tokenizer)

    def __call__(self, batch: dict[str, list]) -> pa.Table:
        """A table of samples for `batch` with the columns `row` (JSON text) and `number`; see `table_of`."""
        rows = [json.loads(row) for row in batch["row"]]
        return self.table_of(self.samples(rows, batch["number"]), rows, batch["number"])

    @property
    def features(self) -> datasets.Features:
        """Types of the columns of `table_of`."""
        tokens = datasets.List(datasets.Value("int32"))
        targets = {"labels": tokens}
        if self._classified_task:
            targets = {"label": tokens if self._multi_label else datasets.Value("int64")}
        if self._with_segments:
            targets["token_type_ids"] = tokens
        counted = {name: datasets.Value("int64") for name in ("weight", "number")}
        rest = {"truncated": datasets.Value("bool"), "length": datasets.Value("int64")}
        return datasets.Features(
            {"input_ids": tokens, **targets, **counted, **rest, "problem": datasets.Value("string")}
        )

    def plain_prompt_ids(self, text: str) -> list[int]:
        """Tokens of a text that the model is to continue: with the first special tokens, without an end."""
        ids = self._control.ids(text, self._own_tokens(text, end=None))
        return [*self._missing_prefix(ids), *ids]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def samples(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Samples of normalised `rows`, in order; `numbers` is how their rows are called."""
        match self._task:
            case ChatConfig():
                return self._chat(rows, numbers)
            case CausalLmConfig():
                return self._documents(rows, numbers)
            case ClassificationConfig():
                return self._classified(rows, numbers)
        raise AssertionError(f"no tokenization for {self._task!r}")

    def table_of(self, samples: list[Sample], rows: Rows, numbers: list[int]) -> pa.Table:
        """`samples` as columns: input_ids, labels or label, weight, number, truncated, length, problem.

        `label` is the index of the row's label, with `task.multi_label` a 1 or 0 for each label.
        """
        columns: dict[str, pa.Array] = {"input_ids": _lists([sample.input_ids for sample in samples])}
        if self._classified_task:
            row_of = dict(zip(numbers, rows, strict=True))
            chosen = [[self._label_ids[name] for name in labels_of(row_of[sample.row])] for sample in samples]
            if self._multi_label:
                columns["label"] = _lists([np.isin(np.arange(len(self._label_ids)), indices) for indices in chosen])
            else:
                columns["label"] = pa.array([index for (index,) in chosen], pa.int64())
            weights = [1] * len(samples)
        else:
            columns["labels"] = _lists([sample.labels for sample in samples])
            weights = [int(np.count_nonzero(sample.labels != NO_TARGET)) for sample in samples]
        if self._with_segments:
            columns["token_type_ids"] = _lists([sample.segments for sample in samples if sample.segments is not None])
        columns["weight"] = pa.array(weights, pa.int64())
        columns["number"] = pa.array([sample.row for sample in samples], pa.int64())
        columns["truncated"] = pa.array([sample.truncated for sample in samples], pa.bool_())
        columns["length"] = pa.array([sample.length for sample in samples], pa.int64())
        columns["problem"] = pa.array([sample.problem for sample in samples], pa.string())
        return pa.table(columns)

    def _chat(self, rows: Rows, numbers: list[int]) -> list[Sample]:
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
            if self._train_on_prompt and self.renderer is None:
                targets = np.ones(len(input_ids), dtype=bool)
            else:
                targets = target_mask(np.array(offsets, dtype=np.int64).reshape(-1, 2), row_spans)
            if self.renderer is None:
                prefix = self._missing_prefix(ids)
                input_ids = np.array([*prefix, *ids, self._tokenizer.eos_token_id], dtype=np.int32)
                targets = np.concatenate([np.full(len(prefix), self._train_on_prompt), targets, [True]])
            samples.append(self._sample(number, input_ids, targets, problem))
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

    def _sample(self, number: int, input_ids: np.ndarray, targets: np.ndarray, problem: str) -> Sample:
        targets[:1] = False  # nothing precedes the first token, so nothing predicts it
        labels = np.where(targets, input_ids, NO_TARGET).astype(np.int32)
        if not problem and not targets.any():
            problem = "no trainable token"
        length = len(input_ids)
        kept = slice(0, self._max_length)
        return Sample(number, input_ids[kept], labels[kept], length > self._max_length, problem, length)

    def _documents(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Documents, cut into pieces of `max_length` tokens that overlap by one token.

        The first token of a piece is no target, so it is the last one of the piece before: no target is lost and
        none counts twice. Example, max_length 4: tokens a b c d e f </s> give [a b c d] and [d e f </s>].
        """
        encoded = self._tokenizer([row["text"] for row in rows], add_special_tokens=False, verbose=False)
        end = self._tokenizer.eos_token_id
        samples = []
        for number, row, ids in zip(numbers, rows, encoded["input_ids"], strict=True):
            if self._control.first(row):
                ids = self._control.ids(row["text"], self._own_tokens(row["text"], self._tokenizer.eos_token))
            prefix = self._missing_prefix(ids)
            document = np.array([*prefix, *ids, *([] if ids[-1:] == [end] else [end])], dtype=np.int32)
            step = self._max_length - 1
            for start in range(0, max(len(document) - 1, 1), step):
                piece = document[start : start + self._max_length]
                sample = self._sample(number, piece, np.ones(len(piece), dtype=bool), "")
                sample.truncated = len(document) > self._max_length
                sample.length = len(document)
                samples.append(sample)
        return samples

    def _own_tokens(self, text: str, end: str | None) -> list[int]:
        """Where a document has a first special token, or an `end`, that it would get anyway: there they are no text."""
        first = [0] if self._prefix and text.startswith(self._tokenizer.decode(self._prefix)) else []
        return [*first, *([len(text) - len(end)] if end and text.endswith(end) else [])]

    def _missing_prefix(self, ids: list[int]) -> list[int]:
        """The first special tokens, unless the text brought them itself."""
        return [] if ids[: len(self._prefix)] == self._prefix else self._prefix

    def _classified(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Texts, or pairs of texts, with the special tokens that the tokenizer puts around and between them."""
        texts = [row["text"] for row in rows]
        pairs = [row["text_pair"] for row in rows] if rows and "text_pair" in rows[0] else None
        # Of a pair the longer text is cut first.
        kept = self._tokenizer(texts, pairs, truncation=True, max_length=self._max_length, verbose=False)
        empty = np.empty(0, dtype=np.int32)
        samples = []
        for position, number in enumerate(numbers):
            whole = [texts[position], *([pairs[position]] if pairs else [])]
            ids = np.array(kept["input_ids"][position], dtype=np.int32)
            segments = kept["token_type_ids"][position] if self._with_segments else None
            length = len(ids)
            if self._control.first(whole):
                tokens, segments, length = self._control.sequence(whole, self._max_length)
                ids = np.array(tokens, dtype=np.int32)
            elif length == self._max_length:  # perhaps cut: only then it takes a second look to know
                length = len(self._tokenizer(*whole, verbose=False)["input_ids"])
            sample = Sample(number, ids, empty, length > len(ids), "", length)
            if self._with_segments:
                sample.segments = np.array(segments, dtype=np.int32)
            samples.append(sample)
        return samples


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a chat row; a prompt and its completion are one exchange."""
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _between(spans: list[Span], length: int) -> list[Span]:
    """What `spans` leave of a text of `length` characters, a token without characters at its end included."""
    edges = [0, *(edge for span in spans for edge in span), length + 1]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _first_special_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text by itself (a beginning-of-sequence token), often nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))
