"""task=causal_lm: plain text; the loss is on every token and on the end of each document."""

from __future__ import annotations

from dstune.config.task_schema import CausalLmConfig
from dstune.protocols import task
from dstune.tasks._language import LanguageTask


@task
class CausalLm(LanguageTask):
    Config = CausalLmConfig
    config: CausalLmConfig

    generates = True
    prefix_positions_ok = True
    unpackable = ""
    splits_long_rows = True
    tensor_parallel = True
    few_shot = True
    formats = ("text",)
    metrics = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    ranked_by = (("bits_per_byte", True), ("loss", True))
