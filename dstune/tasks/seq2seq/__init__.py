"""task=seq2seq: a target for a source (translation, summary), by encoder-decoders and by decoders; the loss is on the target."""

from __future__ import annotations

from dstune.config.task_schema import Seq2SeqConfig
from dstune.protocols import Task, task


@task
class Seq2Seq(Task):
    Config = Seq2SeqConfig
    config: Seq2SeqConfig
