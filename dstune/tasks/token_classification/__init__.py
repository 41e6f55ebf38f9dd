"""task=token_classification: a tag for each word: named entities, parts of speech."""

from __future__ import annotations

from dstune.config.task_schema import TokenClassificationConfig
from dstune.protocols import Task, task


@task
class TokenClassification(Task):
    Config = TokenClassificationConfig
    config: TokenClassificationConfig
