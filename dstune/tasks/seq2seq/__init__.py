"""task=seq2seq: a target for a source (translation, summary), by encoder-decoders and by decoders; the loss is on the target."""

from __future__ import annotations

from dstune.config.task_schema import Seq2SeqConfig
from dstune.protocols import Task, task

GENERATION_METRICS = ("bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL")


@task
class Seq2Seq(Task):
    Config = Seq2SeqConfig
    config: Seq2SeqConfig

    language = True
    conversational = True
    generates = True
    unpackable = ""
    encoder_decoder = True
    few_shot = True
    asks_by_prompt = True
    formats = ("source_target",)
    frozen_keys = ("template_date",)
    metrics = ("loss", "perplexity", "token_accuracy", *GENERATION_METRICS)
    generation_metrics = GENERATION_METRICS
    ranked_by = (("chrf", False), ("loss", True))

    @property
    def every_position_is_a_target(self) -> bool:
        return False
