"""task=embedding: a vector for a text, learnt from texts that belong together; all others of a step are what does not."""

from __future__ import annotations

from dstune.config.task_schema import EmbeddingConfig
from dstune.protocols import Task, task


@task
class Embedding(Task):
    Config = EmbeddingConfig
    config: EmbeddingConfig
