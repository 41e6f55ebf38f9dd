"""task=classification: a label, or several, for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import Task, task
from dstune.tasks.causal_lm.config import CausalLmConfig
from dstune.tasks.classification import rows as rows
from dstune.tasks.classification import rules
from dstune.tasks.classification.config import ClassificationConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dstune.checkpoint.card import Export
    from dstune.config.schema import RunConfig
    from dstune.data.prepared import PreparedData, Split
    from dstune.data.tokenize.sample import Encoder
    from dstune.inference.predictor import Predictor
    from dstune.models.heads import Head, Rows
    from dstune.trainer.baseline import Prompted
    from dstune.trainer.counterfactual import EvaluatedRows
    from dstune.trainer.measure import Evaluation, Row, Totals


@task
class Classification(Task):
    Config = ClassificationConfig
    config: ClassificationConfig

    serves = ("classify", "rank")
    has_head = True
    unpoolable = ""
    head_classes = "ForSequenceClassification"
    peft_type = "SEQ_CLS"
    pipeline = "text-classification"
    prefix_positions_ok = True
    unpackable = "one row is one text in classification"
    unrecorded = ("class_weights", "balanced")
    few_shot = True
    gives_probabilities = True
    same_label_when_reworded = True
    output = "classifier"
    formats = ("pair", "text_label")
    ranked_by = (("accuracy", False),)

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.config.regression:
            return ("loss", "mae", "rmse", "pearson", "spearman")
        return ("loss", "accuracy", "f1_macro", "f1_micro", "mcc", "auroc")

    @property
    def has_labels(self) -> bool:
        return not self.config.regression

    @property
    def several_labels(self) -> bool:
        return self.config.multi_label

    def model_class(self, architecture: PretrainedConfig) -> Any:
        if getattr(architecture, "dstune_head", None):  # set in the configuration of exports with a pooled head
            from dstune.models.pooled import PooledForSequenceClassification

            return PooledForSequenceClassification
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def architecture(
        self, architecture: PretrainedConfig, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().architecture(architecture, labels, tokenizer)
        # Tells those who load the export which loss and which kind of answer its logits are for.
        architecture.problem_type = "single_label_classification"
        if self.config.multi_label:
            architecture.problem_type = "multi_label_classification"
        if self.config.regression:
            architecture.problem_type = "regression"
            architecture.num_labels = 1

    def from_architecture(self, run: RunConfig, architecture: PretrainedConfig) -> RunConfig:
        from dstune.checkpoint.own_labels import name_labels

        several = architecture.problem_type == "multi_label_classification"
        one_number = architecture.num_labels == 1 and not several  # whatever it declares: one class is not a choice
        if architecture.problem_type == "regression" or one_number:
            return replace(run, task=replace(self.config, regression=True, labels=[]))
        return name_labels(run, architecture, **({"multi_label": True} if several else {}))

    def slice_metric(self, measured: Mapping[str, float]) -> str:
        return "rmse" if self.config.regression else "accuracy"

    def with_labels(self, labels: Sequence[str]) -> ClassificationConfig:
        return replace(self.config, labels=list(labels))

    def as_text_task(self, run: RunConfig) -> CausalLmConfig:
        from dstune.tasks.classification.prompted import refuse_encoder

        refuse_encoder(run)
        return CausalLmConfig()

    def prompted(self, run: RunConfig, data: PreparedData, tokenizer: Any, key: str) -> Prompted:
        from dstune.tasks.classification.prompted import PromptedLabels

        return PromptedLabels(key, run, self.config, data, tokenizer)

    def usage(self, export: Export) -> list[str]:
        return [
            *export.loading("SequenceClassification", len(export.state["labels"])),
            'logits = model(**tokenizer("A text.", return_tensors="pt")).logits',
            "print(logits.argmax(-1))",
            f"# labels by index: {export.labels}" if export.adapter else "# model.config.id2label[int(...)]",
        ]

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.classification.head import classification_head

        return classification_head(self.config)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.tasks.classification.metrics import measure

        return measure(self.config, totals, outputs)

    def counterfactual(
        self, run: RunConfig, before: EvaluatedRows, after: EvaluatedRows, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        import numpy as np

        from dstune.trainer.counterfactual import flips, predictions

        if not self.config.regression:
            return {"flips": flips(predictions(*before), predictions(*after), places)}
        old, new = (np.array(predictions(*evaluated))[:, 0] for evaluated in (before, after))
        return {"prediction_change": new - old[places]}

    def check(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check(run, self.config)

    def class_weights(self, labels: tuple[str, ...], counts: Callable[[], Mapping[str, int]], rows: int) -> list[float]:
        return rules.class_weights(self.config, labels, counts, rows)

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.classification.encode import ClassificationEncoder

        return ClassificationEncoder(tokenizer, self.config, fmt, max_length, labels, class_weights)

    def predictor(self) -> type[Predictor]:
        from dstune.tasks.classification.predict import ClassificationPredictor

        return ClassificationPredictor
