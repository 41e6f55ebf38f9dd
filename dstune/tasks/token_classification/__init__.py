"""task=token_classification: a tag for each word: named entities, parts of speech."""

from __future__ import annotations

from dstune.config.task_schema import TokenClassificationConfig
from dstune.protocols import Task, task


@task
class TokenClassification(Task):
    Config = TokenClassificationConfig
    config: TokenClassificationConfig

    has_head = True
    per_token = True
    unpoolable = "task=token_classification reads every token, and pooling leaves one vector of all"
    unpackable = "one row is one sentence, or a window of it"
    splits_long_rows = True
    output = "token classifier"
    formats = ("tokens_tags",)
    metrics = ("loss", "token_accuracy", "entity_f1", "entity_precision", "entity_recall", "f1_macro")

    @property
    def has_labels(self) -> bool:
        return True

    @property
    def several_labels(self) -> bool:
        return True
