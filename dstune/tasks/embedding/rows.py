"""Row format of texts that belong together."""

from __future__ import annotations

from typing import Any, ClassVar

from dstune.data.problems import RowError
from dstune.data.values import text, text_or_texts
from dstune.protocols import RowFormat, row_format
from dstune.protocols.row_format import Check
from dstune.protocols.task import Task


@row_format
class Contrastive(RowFormat):
    name = "contrastive"
    required = ("anchor", "positive")
    optional = ("negative",)
    checks: ClassVar[dict[str, Check]] = {"anchor": text, "positive": text_or_texts, "negative": text_or_texts}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        positives, negatives = texts_of(values["positive"]), texts_of(values.get("negative"))
        if not positives:
            raise RowError("there is no positive")
        if set(positives).intersection(negatives):
            raise RowError("positive and negative are the same")
        texts_by_kind = {"positive": positives, "negative": negatives}
        return {
            "anchor": values["anchor"],
            **{kind: texts[0] if len(texts) == 1 else texts for kind, texts in texts_by_kind.items() if texts},
        }


@row_format
class Bge(Contrastive):
    """The columns of FlagEmbedding's files: a query with lists of texts that belong to it and that do not."""

    name = "bge"
    required = ("query", "pos")
    optional = ("neg",)
    checks: ClassVar[dict[str, Check]] = {"query": text, "pos": text_or_texts, "neg": text_or_texts}

    def row(self, values: dict[str, Any], task: Task | None) -> dict[str, Any]:
        return super().row({"anchor": values["query"], "positive": values["pos"], "negative": values.get("neg")}, task)


def texts_of(value: str | list[str] | None) -> list[str]:
    """Return the texts of a column that holds one, several or none."""
    return [value] if isinstance(value, str) else list(value or ())
