"""task=token_classification: a tag for each word: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.data.tags import TagScheme, completed
from dstune.protocols import Task, task
from dstune.tasks.token_classification import rows as rows
from dstune.tasks.token_classification import rules
from dstune.tasks.token_classification.config import TokenClassificationConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel

    from dstune.checkpoint.card import Export
    from dstune.config.schema import RunConfig
    from dstune.data.prepared import Split
    from dstune.data.tokenize.sample import Encoder
    from dstune.inference.predictor import Predictor
    from dstune.models.heads import Head, Rows
    from dstune.trainer.counterfactual import EvaluatedRows
    from dstune.trainer.measure import Evaluation, Row, Totals


@task
class TokenClassification(Task):
    Config = TokenClassificationConfig
    config: TokenClassificationConfig

    serves = ("tag",)
    has_head = True
    head_classes = "ForTokenClassification"
    peft_type = "TOKEN_CLS"
    pipeline = "token-classification"
    per_token = True
    unpoolable = "task=token_classification reads every token, and pooling leaves one vector of all"
    unpackable = "one row is one sentence, or a chunk of it"
    splits_long_rows = True
    chunked = True
    token_targets = True
    output = "token classifier"
    formats = ("tokens_tags",)
    metrics = ("loss", "token_accuracy", "entity_f1", "entity_precision", "entity_recall", "f1_macro")

    @property
    def has_labels(self) -> bool:
        return True

    @property
    def several_labels(self) -> bool:
        return True

    def model_class(self, architecture: PretrainedConfig) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def from_architecture(self, run: RunConfig, architecture: PretrainedConfig) -> RunConfig:
        from dstune.checkpoint.own_labels import name_labels

        return name_labels(run, architecture)

    def slice_metric(self, measured: Mapping[str, float]) -> str:
        return "entity_f1" if "entity_f1" in measured else "token_accuracy"

    def usage(self, export: Export) -> list[str]:
        if export.adapter:
            lines = export.loading("TokenClassification", len(export.state["labels"]))
            return [*lines, f"# labels by index: {export.labels}"] if export.labels else lines
        return [
            "from transformers import pipeline",
            "",
            'path = "PATH"  # this folder, or the id under which it was published',
            'print(pipeline("token-classification", path)("A text."))',
        ]

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.token_classification.head import token_classification_head

        return token_classification_head

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.tasks.token_classification.metrics import measure

        return measure(self.config, labels, split, totals, outputs)

    def counterfactual(
        self, run: RunConfig, before: EvaluatedRows, after: EvaluatedRows, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        from dstune.trainer.counterfactual import flips, predictions

        return {"flips": flips(predictions(*before), predictions(*after), places)}

    def check(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check(run, self.config)

    def complete_labels(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        return labels if self.config.scheme is TagScheme.plain else completed(labels)

    def check_labels(self, run: RunConfig, labels: tuple[str, ...]) -> None:
        rules.refuse_odd_tags(self.config, labels)
        rules.refuse_other_metric(run, self.config, labels)

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.token_classification.encode import TokenEncoder

        return TokenEncoder(tokenizer, self.config, max_length, labels)

    def predictor(self) -> type[Predictor]:
        from dstune.tasks.token_classification.predict import TaggingPredictor

        return TaggingPredictor
