"""task=causal_lm: plain text; the loss is on every token and on the end of each document."""

from __future__ import annotations

from dstune.config.task_schema import CausalLmConfig
from dstune.protocols import task
from dstune.tasks._language import LanguageTask
from dstune.tasks.causal_lm import rows as rows


@task
class CausalLm(LanguageTask):
    Config = CausalLmConfig
    config: CausalLmConfig

    prefix_positions_ok = True
    splits_long_rows = True
    tensor_parallel = True
    formats = ("text",)
    metrics = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    ranked_by = (("bits_per_byte", True), ("loss", True))
