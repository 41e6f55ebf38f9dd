"""task=question_answering: the answer to a question as a span of a text (SQuAD, Rajpurkar et al. 2016 and 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dstune.protocols import Task, task
from dstune.tasks.question_answering import rows as rows
from dstune.tasks.question_answering.config import QuestionAnsweringConfig

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
class QuestionAnswering(Task):
    Config = QuestionAnsweringConfig
    config: QuestionAnsweringConfig

    serves = ("answer",)
    has_head = True
    head_classes = "ForQuestionAnswering"
    peft_type = "QUESTION_ANS"
    pipeline = "question-answering"
    per_token = True
    unpoolable = "task=question_answering reads every token, and pooling leaves one vector of all"
    unpackable = "one row is one question with its text"
    splits_long_rows = True
    chunked = True
    predicts_from_text = False
    metrics_read_rows = True
    output = "token classifier"
    formats = ("squad",)
    metrics = ("loss", "exact_match", "f1", "best_f1")

    def model_class(self, architecture: PretrainedConfig) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def slice_metric(self, measured: Mapping[str, float]) -> str:
        return "f1"

    def usage(self, export: Export) -> list[str]:
        return [
            *export.loading("QuestionAnswering", len(export.state["labels"])),
            'inputs = tokenizer("A question?", "A text.", return_tensors="pt")',
            "output = model(**inputs)",
            "first, last = output.start_logits.argmax(), output.end_logits.argmax()",
            'print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))',
        ]

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.question_answering.head import AnswerHead

        return AnswerHead(self.config.max_answer_tokens)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.tasks.question_answering.metrics import measure

        return measure(self.config, split, totals, outputs)

    def counterfactual(
        self, run: RunConfig, before: EvaluatedRows, after: EvaluatedRows, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        from dstune.tasks.question_answering.metrics import swapped_answers
        from dstune.trainer.counterfactual import flips

        return {"flips": flips(*swapped_answers(self.config, run, before, after), places)}

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.question_answering.encode import AnswerEncoder

        return AnswerEncoder(tokenizer, self.config, max_length)

    def predictor(self) -> type[Predictor]:
        from dstune.tasks.question_answering.predict import AnswerPredictor

        return AnswerPredictor
