"""Vectors of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dstune.data.prepared import Split
from dstune.inference.predictor import Answer, Predictor
from dstune.inference.rows import Query, Question
from dstune.models.heads.base import Batch, inputs_of
from dstune.tasks.embedding.head import pooled
from dstune.trainer.measure import Row


class EmbeddingQuestion(Question):
    @property
    def text_column(self) -> str:
        return self.mapping.get("text", self.mapping.get("anchor", "text"))

    def row(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        return {"anchor": self.text(fields, "text", "anchor")}


class EmbeddingPredictor(Predictor):
    question_class = EmbeddingQuestion
    reads_columns = False

    def computed(self, batch: Batch) -> Mapping[str, Any]:
        task: Any = self.config.task
        hidden = self.model(**inputs_of(batch)).last_hidden_state
        return {"vector": pooled(hidden, batch["attention_mask"], task.pooling)}

    def answers_from(
        self, split: Split, outputs: list[Row], rows: Sequence[Query], *, all_labels: bool
    ) -> Iterator[Answer]:
        for row in outputs:
            yield {"vector": row["vector"].tolist()}
