"""task=classification: a label, or several, for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dstune.config.schema import RunConfig
from dstune.config.task_schema import ClassificationConfig
from dstune.errors import Problem
from dstune.protocols import Task, task
from dstune.tasks.classification import rows as rows
from dstune.tasks.classification import rules

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from dstune.config.schema import RunConfig
    from dstune.data.prepared import Split
    from dstune.data.tokenize.sample import Encoder
    from dstune.models.heads import Head, Rows
    from dstune.train.counterfactual import Evaluated
    from dstune.train.measure import Evaluation, Row, Totals


@task
class Classification(Task):
    Config = ClassificationConfig
    config: ClassificationConfig

    has_head = True
    unpoolable = ""
    prefix_positions_ok = True
    unpackable = "one row is one text in classification"
    few_shot = True
    same_label_when_reworded = True
    output = "classifier"
    formats = ("pair", "text_label")
    ranked_by = (("accuracy", False),)

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.config.regression:
            return ("loss", "mae", "rmse", "pearson", "spearman")
        return ("loss", "accuracy", "f1_macro", "f1_micro", "mcc", "auroc")

    @property
    def has_labels(self) -> bool:
        return not self.config.regression

    @property
    def several_labels(self) -> bool:
        return self.config.multi_label

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.classification.head import classification_head

        return classification_head(self.config)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, kept: Sequence[Row]) -> Evaluation:
        from dstune.tasks.classification.metrics import measure

        return measure(self.config, totals, kept)

    def counterfactual(
        self, run: RunConfig, before: Evaluated, after: Evaluated, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        import numpy as np

        from dstune.train.counterfactual import flips, predictions

        if not self.config.regression:
            return {"flips": flips(predictions(*before), predictions(*after), places)}
        old, new = (np.array(predictions(*evaluated))[:, 0] for evaluated in (before, after))
        return {"prediction_change": new - old[places]}

    def check(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check(run, self.config)

    def class_weights(self, labels: tuple[str, ...], counts: Callable[[], Mapping[str, int]], rows: int) -> list[float]:
        return rules.class_weights(self.config, labels, counts, rows)

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.classification.encode import ClassificationEncoder

        return ClassificationEncoder(tokenizer, self.config, fmt, max_length, labels, class_weights)
