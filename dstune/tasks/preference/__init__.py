"""task=preference: two answers to a prompt, the better one first (with `kto` single answers, good or bad)."""

from __future__ import annotations

from dstune.config.task_schema import PreferenceConfig
from dstune.protocols import Task, task


@task
class Preference(Task):
    Config = PreferenceConfig
    config: PreferenceConfig
