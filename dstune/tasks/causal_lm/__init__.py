"""task=causal_lm: plain text; the loss is on every token and on the end of each document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dstune.protocols import task
from dstune.tasks._language import LanguageTask
from dstune.tasks.causal_lm import rows as rows
from dstune.tasks.causal_lm.config import CausalLmConfig

if TYPE_CHECKING:
    from dstune.data.tokenize.sample import Encoder


@task
class CausalLm(LanguageTask):
    Config = CausalLmConfig
    config: CausalLmConfig

    prefix_positions_ok = True
    splits_long_rows = True
    tensor_parallel = True
    one_pass = True
    formats = ("text", "tokens")
    has_predictions = False
    metrics = ("loss", "perplexity", "token_accuracy", "bits_per_byte")
    ranked_by = (("bits_per_byte", True), ("loss", True))

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.causal_lm.encode import DocumentEncoder, TokensEncoder

        return TokensEncoder(tokenizer, max_length) if fmt == "tokens" else DocumentEncoder(tokenizer, max_length)
