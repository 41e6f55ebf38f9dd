"""task=classification: a label, or several, for a text or a pair of texts."""

from __future__ import annotations

from dstune.config.task_schema import ClassificationConfig
from dstune.protocols import Task, task


@task
class Classification(Task):
    Config = ClassificationConfig
    config: ClassificationConfig

    has_head = True
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
