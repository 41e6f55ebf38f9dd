"""Predicts the tags of words, and the entities that they mark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dstune.data.formats import column_of
from dstune.data.prepared import Split
from dstune.data.rows import RowError, normalise
from dstune.data.tags import AS_BIO, OUTSIDE, TagScheme, marks_entities
from dstune.inference.predictor import Answer, Predictor
from dstune.inference.rows import Query, Question
from dstune.tasks.token_classification.rows import TokensTags
from dstune.trainer.measure import Row, rows_of


class TaggingQuestion(Question):
    role = "tokens"

    @property
    def text_column(self) -> str:
        return self.mapping.get("tokens", "tokens")

    def row(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        column = column_of(TokensTags, "tokens", self.mapping, fields)
        if column not in fields and self.mapping.get("text", "text") in fields:
            column = self.mapping.get("text", "text")
        if column not in fields:
            raise RowError(self.missing("tokens", fields))
        # The format requires as many tags as words; the words themselves serve as placeholders.
        columns = {"tokens": column, "tags": column}
        row = normalise(fields, "tokens_tags", columns, replace(self.task, scheme=TagScheme.plain))
        tag = OUTSIDE if OUTSIDE in self.labels else self.labels[0]
        return {**row, "tags": [tag] * len(row["tokens"])}


class TaggingPredictor(Predictor):
    question_class = TaggingQuestion

    def answers_from(
        self, split: Split, outputs: list[Row], rows: Sequence[Query], *, all_labels: bool
    ) -> Iterator[Answer]:
        task: Any = self.config.task
        marked = marks_entities(self.labels, task.scheme)
        for query, chunks in zip(rows, rows_of(split, outputs), strict=True):
            tags = [self.labels[index] for chunk in chunks for index in chunk["prediction"]]
            words = query.row["tokens"]
            yield {"tokens": words, "predicted": tags} | ({"entities": entities(words, tags)} if marked else {})


def entities(words: Sequence[str], tags: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entities that `tags` mark (BIO, BIOES, BILOU): `type`, `text`, and `start` and `end` (exclusive), the numbers of
    their words.

    A tag that continues no entity of its type begins one, as metrics of entities count it.
    """
    entities_found: list[dict[str, Any]] = []
    kind_before = OUTSIDE
    for number, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if tag != OUTSIDE:
            if AS_BIO.get(mark, mark) == "I" and kind_before == kind:
                entities_found[-1]["end"] = number + 1
            else:
                entities_found.append({"type": kind, "text": "", "start": number, "end": number + 1})
        kind_before = kind if tag != OUTSIDE and mark not in ("S", "U", "E", "L") else OUTSIDE
    return [entity | {"text": " ".join(words[entity["start"] : entity["end"]])} for entity in entities_found]
