"""Encodes a question with a chunk of its text, and where in the chunk the answer begins and ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from dstune.data.answers import Answer
from dstune.data.chat.targets import require_offsets
from dstune.data.control import ControlTokens
from dstune.data.frame import Frame, chunks
from dstune.data.tokenize.sample import Encoder, Rows, Sample
from dstune.tasks.question_answering.config import QuestionAnsweringConfig

NOT_IN_CONTEXT = -1


class AnswerEncoder(Encoder):
    """Encodes questions. A text that does not fit beside its question becomes several chunks that overlap by `task.stride` tokens.

    `start` and `end` are the first and last token of the first answer; in a chunk that does not hold all of it, and for a
    question without an answer, both are `null`, the classification token (or the first one, where a tokenizer has none).
    `char_start` and `char_end` tell the characters of the context that a token stands for, NOT_IN_CONTEXT elsewhere. A
    question is cut to half of `max_length`.
    """

    def __init__(self, tokenizer: Any, task: QuestionAnsweringConfig, max_length: int):
        require_offsets(tokenizer)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._stride = task.stride
        self._frame = Frame.of(tokenizer, 2)
        self._with_segments = "token_type_ids" in tokenizer.model_input_names
        self._control = ControlTokens(tokenizer)

    @property
    def columns(self) -> Mapping[str, Any]:
        tokens = datasets.List(datasets.Value("int32"))
        segments = {"token_type_ids": tokens} if self._with_segments else {}
        places = {name: datasets.Value("int64") for name in ("start", "end", "null")}
        return {"char_start": tokens, "char_end": tokens, **segments, **places}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        contexts = [row["context"] for row in rows]
        encoded = self._tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        samples: list[Sample] = []
        for number, row, ids, offsets in zip(
            numbers, rows, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if self._control.first(row["context"]):
                ids, offsets = self._control.neutral(ids, offsets, row["context"], [])
            question = self._control.ids(row["question"])
            places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
            samples += self._chunks(number, question, list(ids), places, row["answers"])
        return samples

    def _chunks(
        self, number: int, question: list[int], context: list[int], offsets: np.ndarray, answers: list[Answer]
    ) -> list[Sample]:
        room = self._max_length - self._frame.size
        cut_question = question[: room // 2]
        size = room - len(cut_question)
        span = _tokens_of(answers[0], offsets) if answers else None
        problem = "no token holds the first answer" if answers and span is None else ""
        length = len(question) + len(context) + self._frame.size
        samples = []
        for start, end in chunks(len(context), size, min(self._stride, size // 2)):
            ids, kinds, (_, place) = self._frame.around([cut_question, context[start:end]])
            char_start, char_end = np.full(len(ids), NOT_IN_CONTEXT), np.full(len(ids), NOT_IN_CONTEXT)
            char_start[place : place + end - start] = offsets[start:end, 0]
            char_end[place : place + end - start] = offsets[start:end, 1]
            null = ids.index(self._tokenizer.cls_token_id) if self._tokenizer.cls_token_id in ids else 0
            columns = {"char_start": char_start, "char_end": char_end, "start": null, "end": null, "null": null}
            if span is not None and start <= span[0] and span[1] < end:
                columns |= {"start": place + span[0] - start, "end": place + span[1] - start}
            if self._with_segments:
                columns["token_type_ids"] = np.array(kinds)
            samples.append(Sample(number, np.array(ids), columns, 1, length > self._max_length, problem, length))
        return samples


def _tokens_of(answer: Answer, offsets: np.ndarray) -> tuple[int, int] | None:
    """Return the first and last token with a character of the answer; None if no token has one."""
    start, end = answer["start"], answer["start"] + len(answer["text"])
    held = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0]))
    return (int(held[0]), int(held[-1])) if len(held) else None
