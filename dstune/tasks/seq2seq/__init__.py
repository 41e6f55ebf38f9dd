"""task=seq2seq: a target for a source (translation, summary), by encoder-decoders and by decoders; the loss is on the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dstune.config.task_schema import Seq2SeqConfig
from dstune.protocols import task
from dstune.tasks._language import LanguageTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dstune.data.prepared import Split
    from dstune.models.heads import Head, Rows
    from dstune.train.evaluate import Evaluator
    from dstune.train.measure import Evaluation, Row, Totals

GENERATION_METRICS = ("bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL")


@task
class Seq2Seq(LanguageTask):
    Config = Seq2SeqConfig
    config: Seq2SeqConfig

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

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.models.heads.language import CausalLmHead, EncoderDecoderHead

        return EncoderDecoderHead(model) if model.config.is_encoder_decoder else CausalLmHead(model, rows)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, kept: Sequence[Row]) -> Evaluation:
        from dstune.train.language_metrics import language_model_metrics
        from dstune.train.measure import Evaluation

        return Evaluation(language_model_metrics(totals.loss_sum, totals.weight, totals.correct))

    def extra_evaluation(
        self,
        evaluator: Evaluator,
        split: Split,
        measured: Evaluation,
        context: Sequence[int] = (),
        *,
        one_line: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Targets that the model generates, and their metrics."""
        if evaluator.config.evaluate.generate_rows == 0:
            return measured
        from dstune.tasks.seq2seq.metrics import generate_and_measure

        return generate_and_measure(evaluator, split, measured, context, one_line=one_line, progress=progress)
