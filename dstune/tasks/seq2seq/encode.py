"""Encodes sources and targets as samples, for encoder-decoders and for decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from dstune.core.errors import Problem, UserError
from dstune.data.chat.evidence import Exchange
from dstune.data.chat.targets import require_offsets
from dstune.data.collate import NO_TARGET
from dstune.data.prepared import TEXTS
from dstune.data.special_tokens import end_of_target
from dstune.data.tokenize.conversations import ChatEncoder, Language
from dstune.data.tokenize.sample import Encoder, Rows, Sample
from dstune.tasks.seq2seq.config import Seq2SeqConfig
from dstune.tasks.seq2seq.sources import Sources

_TEXT_COLUMNS = {name: datasets.Value("string") for name in TEXTS}


class TranslationEncoder(Encoder):
    """Encodes a source for the encoder (`input_ids`) and a target for the decoder (`target_ids`), each truncated separately.

    Raises UserError (on creation) if the tokenizer has no token to end a target.

    """

    sources: Sources

    def __init__(self, tokenizer: Any, task: Seq2SeqConfig, max_length: int):
        if end_of_target(tokenizer) is None:
            reason = "the tokenizer has no end-of-sequence token, so the model could not learn to stop"
            raise UserError(Problem("model.path", reason, "choose a model made to generate text"))
        self.sources = Sources(tokenizer, task, encoder_decoder=True)
        self._most = max_length, task.max_target_length or max_length

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"target_ids": datasets.List(datasets.Value("int32")), **_TEXT_COLUMNS}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        samples = []
        for number, row in zip(numbers, rows, strict=True):
            source, length = self.sources.encoder_ids(self.sources.prompt_text(row["source"]), self._most[0])
            target, whole = self.sources.target_ids(row["target"], self._most[1])
            columns = {"target_ids": np.array(target, dtype=np.int32), **{name: row[name] for name in TEXTS}}
            cut = length > len(source) or whole > len(target)
            problem = "chat_template_kwargs are for decoders with a chat template" * ("chat_template_kwargs" in row)
            ids = np.array(source, np.int32)
            samples.append(Sample(number, ids, columns, len(target), cut, problem, length + whole))
        return samples


class ReplyEncoder(ChatEncoder):
    """Encodes a source as a prompt and its target as a decoder's answer. If both are too long together, the end of the source is

    cut off: a row without its target would teach nothing."""

    sources: Sources

    def __init__(self, tokenizer: Any, task: Seq2SeqConfig, max_length: int):
        require_offsets(tokenizer)
        Language.__init__(self, tokenizer, max_length)
        self.sources = Sources(tokenizer, task, encoder_decoder=False)
        self.renderer = self.sources.renderer
        self.trains_on_prompt = False
        self._most = task.max_target_length

    @property
    def columns(self) -> Mapping[str, Any]:
        return {**super().columns, **_TEXT_COLUMNS}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        samples = self._samples_of([(row["source"], row) for row in rows], numbers)
        for place, row in enumerate(rows):
            sample, source = samples[place], row["source"]
            length = sample.length
            while sample.length > self._max_length and source:
                source = self.sources.shortened(source, sample.length - self._max_length)
                (sample,) = self._samples_of([(source, row)], [numbers[place]])
            if not source:  # the target alone is too long
                sample = samples[place]
            sample.truncated, sample.length = length > self._max_length, length
            self._truncate_target(sample)
            sample.columns |= {name: row[name] for name in TEXTS}
            samples[place] = sample
        return samples

    def exchanges(self, row: dict[str, Any]) -> list[Exchange]:
        return [self._exchange(self._conversation(row["source"], row))]

    def _conversation(self, source: str, row: dict[str, Any]) -> dict[str, Any]:
        return self.sources.conversation(source, row["target"], row.get("chat_template_kwargs"))

    def _samples_of(self, pairs: list[tuple[str, dict[str, Any]]], numbers: list[int]) -> list[Sample]:
        return super().__call__([self._conversation(source, row) for source, row in pairs], numbers)

    def _truncate_target(self, sample: Sample) -> None:
        if self._most is not None and sample.weight > self._most:
            end = int(np.flatnonzero(sample.labels != NO_TARGET)[self._most])
            sample.input_ids, sample.columns["labels"] = sample.input_ids[:end], sample.labels[:end]
            sample.weight, sample.truncated = self._most, True
