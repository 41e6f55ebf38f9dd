"""task=question_answering: the answer to a question as a span of a text (SQuAD, Rajpurkar et al. 2016 and 2018)."""

from __future__ import annotations

from dstune.config.task_schema import QuestionAnsweringConfig
from dstune.protocols import Task, task


@task
class QuestionAnswering(Task):
    Config = QuestionAnsweringConfig
    config: QuestionAnsweringConfig
