"""Scores answers with a reward model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dstune.config.data_schema import AUTOMATIC
from dstune.core.errors import UserError
from dstune.data.images.places import COLUMN
from dstune.data.prepared import Split
from dstune.data.problems import listing
from dstune.data.rows import SEES_NONE, RowError, normalise, recognise
from dstune.data.tokenize import Sample
from dstune.inference.predictor import Answer, Predictor
from dstune.inference.rows import Query, Question
from dstune.models.heads.base import Batch, inputs_of
from dstune.tasks.chat.config import ChatConfig
from dstune.tasks.reward.encode import RewardEncoder
from dstune.trainer.measure import Row


class RewardQuestion(Question):
    text_column = None

    def row(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        try:
            fmt = recognise(fields, self.mapping, AUTOMATIC, ChatConfig(), place)
        except UserError:
            expected = "'messages', or 'prompt' and 'completion'"
            raise RowError(f"a reward model scores {expected}; the columns here are {listing(fields)}") from None
        row = normalise(fields, fmt, self.mapping, ChatConfig())
        if COLUMN in row:
            raise RowError(f"the row holds an image; task=reward {SEES_NONE}")
        return row


class RewardPredictor(Predictor):
    question_class = RewardQuestion
    reads_columns = False

    def samples(self, queries: Sequence[Query]) -> list[Sample]:
        task: Any = self.config.task
        rows = [query.row for query in queries]
        fmt = "messages" if any("messages" in row for row in rows) else "preference"
        encode = RewardEncoder(
            self.tokenizer, task.template_date, fmt, self.longest, arguments=task.chat_template_kwargs
        )
        samples = encode.of_answers(rows, list(range(len(rows))))
        for sample in samples:
            if not sample.problem and not sample.weight:
                sample.problem = f"its prompt alone has {self.longest} tokens (data.max_length)"
        return samples

    def computed(self, batch: Batch) -> Mapping[str, Any]:
        return {"score": self.model(**inputs_of(batch)).logits.float()[:, 0]}

    def answers_from(
        self, split: Split, outputs: list[Row], rows: Sequence[Query], *, all_labels: bool
    ) -> Iterator[Answer]:
        for row in outputs:
            yield {"score": row["score"].tolist()}
