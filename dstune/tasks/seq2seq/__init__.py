"""task=seq2seq: a target for a source (translation, summary), by encoder-decoders and by decoders; the loss is on the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import task
from dstune.tasks._language import LanguageTask
from dstune.tasks.seq2seq import rows as rows
from dstune.tasks.seq2seq.config import Seq2SeqConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dstune.checkpoint.card import Export
    from dstune.data.prepared import Split
    from dstune.data.tokenize.sample import Encoder
    from dstune.models.heads import Head, Rows
    from dstune.tasks.seq2seq.sources import Sources
    from dstune.trainer.evaluate import Evaluator
    from dstune.trainer.measure import Evaluation, Row, Totals

SCORING_PACKAGES = {
    "sacrebleu": ("sacrebleu", ("bleu", "chrf", "ter")),
    "rouge-score": ("rouge_score", ("rouge1", "rouge2", "rougeL")),
}
"""For each package, its module and the metrics of generated targets that it computes."""

GENERATION_METRICS = ("bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL")


@task
class Seq2Seq(LanguageTask):
    Config = Seq2SeqConfig
    config: Seq2SeqConfig

    conversational = True
    encoder_decoder = True
    asks_by_prompt = True
    formats = ("source_target",)
    frozen_keys = ("template_date",)
    metrics = ("loss", "perplexity", "token_accuracy", *GENERATION_METRICS)
    generation_metrics = GENERATION_METRICS
    ranked_by = (("chrf", False), ("loss", True))

    @property
    def every_position_is_a_target(self) -> bool:
        return False

    def model_class(self, architecture: PretrainedConfig) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else super().model_class(architecture)

    def example_prompt(self, export: Export) -> str:
        prompt = self.config.prompt.replace("{source}", "TEXT")
        alone = export.encoder_decoder or self.asks_by_chat(export)
        return prompt if alone else prompt + self.config.separator

    def asks_by_chat(self, export: Export) -> bool:
        return self.config.chat and export.chat_template

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.models.heads.language import CausalLmHead, EncoderDecoderHead

        return EncoderDecoderHead(model) if model.config.is_encoder_decoder else CausalLmHead(model, rows)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.metrics.language import language_model_metrics
        from dstune.trainer.measure import Evaluation

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
        """Generate targets with the model; return them with their metrics."""
        if evaluator.config.evaluate.generate_rows == 0:
            return measured
        from dstune.tasks.seq2seq.metrics import generate_and_measure

        return generate_and_measure(evaluator, split, measured, context, one_line=one_line, progress=progress)

    def check(self, run: RunConfig) -> Iterator[Problem]:
        if self.config.prompt.count("{source}") != 1:
            reason = "the prompt must contain {source} exactly once"
            yield Problem(
                "task.prompt", reason, "task.prompt='\"Translate: {source}\"'", format_value(self.config.prompt)
            )

    def preflight(self, run: RunConfig) -> Iterator[Problem]:
        """Check that the package of a score of generated targets is installed if the run depends on that score. Scores that it does
        not depend on are left out."""
        deciding: dict[str, list[str | None]] = {
            "trainer.early_stopping.metric": [run.trainer.early_stopping.metric],
            "sweep.objective": list(run.sweep.objective),
            "evaluate.slice_metric": [run.evaluate.slice_metric],
        }
        for package, (module, names) in SCORING_PACKAGES.items():
            for key, metrics in deciding.items() if find_spec(module) is None else ():
                if missing := [name for name in metrics if name in names]:
                    reason = f"the package {package}, which computes this metric, is not installed"
                    yield Problem(
                        key, reason, "pip install '.[generation]' in a clone of dstune, or another metric", missing[0]
                    )

    def sources(self, tokenizer: Any, *, encoder_decoder: bool) -> Sources:
        from dstune.tasks.seq2seq.sources import Sources

        return Sources(tokenizer, self.config, encoder_decoder=encoder_decoder)

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.config.architectures import is_encoder_decoder
        from dstune.tasks.seq2seq.encode import ReplyEncoder, TranslationEncoder

        kind = TranslationEncoder if is_encoder_decoder(tokenizer) else ReplyEncoder
        return kind(tokenizer, self.config, max_length)
