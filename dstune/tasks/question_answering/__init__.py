"""task=question_answering: the answer to a question as a span of a text (SQuAD, Rajpurkar et al. 2016 and 2018)."""

from __future__ import annotations

from dstune.config.task_schema import QuestionAnsweringConfig
from dstune.protocols import Task, task


@task
class QuestionAnswering(Task):
    Config = QuestionAnsweringConfig
    config: QuestionAnsweringConfig

    has_head = True
    per_token = True
    unpoolable = "task=question_answering reads every token, and pooling leaves one vector of all"
    unpackable = "one row is one question with its text"
    splits_long_rows = True
    predicts_from_text = False
    metrics_read_rows = True
    output = "token classifier"
    formats = ("squad",)
    metrics = ("loss", "exact_match", "f1", "best_f1")
