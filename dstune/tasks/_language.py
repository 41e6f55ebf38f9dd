"""What the tasks of language models have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from dstune.protocols import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dstune.data.prepared import Split
    from dstune.models.heads import Head, Rows
    from dstune.train.measure import Evaluation, Row, Totals


class LanguageTask(Task):
    """Next-token loss of a decoder."""

    language: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    unpackable: ClassVar[str] = ""
    few_shot: ClassVar[bool] = True

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.models.heads.language import CausalLmHead

        return CausalLmHead(model, rows)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, kept: Sequence[Row]) -> Evaluation:
        from dstune.train.language_metrics import language_model_metrics
        from dstune.train.measure import Evaluation

        size = int(split.column("bytes").sum())
        return Evaluation(language_model_metrics(totals.loss_sum, totals.weight, totals.correct, size))
