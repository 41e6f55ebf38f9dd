"""task=classification: a label, or several, for a text or a pair of texts."""

from __future__ import annotations

from dstune.config.task_schema import ClassificationConfig
from dstune.protocols import Task, task


@task
class Classification(Task):
    Config = ClassificationConfig
    config: ClassificationConfig
