"""task=embedding: a vector for a text, learnt from texts that belong together; all others of a step are what does not."""

from __future__ import annotations

from dstune.config.task_schema import EmbeddingConfig
from dstune.protocols import Task, task


@task
class Embedding(Task):
    Config = EmbeddingConfig
    config: EmbeddingConfig

    row_loss = False
    comparable_loss = False
    unpackable = "every text has a vector of its own"
    texts_per_row = 2
    output = "body"
    formats = ("contrastive",)
    metrics = ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr")
    ranked_by = (("mrr", False), ("accuracy", False), ("loss", True))

    @property
    def whole_batch_loss(self) -> bool:
        return True
