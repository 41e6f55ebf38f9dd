"""From what the ranks have summed and kept of an evaluation to the metrics of the task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dstune.config.task_schema import (
    CausalLmConfig,
    ChatConfig,
    ClassificationConfig,
    EmbeddingConfig,
    PreferenceConfig,
    QuestionAnsweringConfig,
    RewardConfig,
    Seq2SeqConfig,
    TokenClassificationConfig,
)
from dstune.data.prepared import Split
from dstune.protocols.task import TaskConfig
from dstune.train.generation import Generated
from dstune.train.metrics import (
    answer_metrics,
    classification_metrics,
    embedding_metrics,
    language_model_metrics,
    multi_label_metrics,
    preference_metrics,
    regression_metrics,
    reward_metrics,
    token_metrics,
)

Row = dict[str, np.ndarray]
"""What the task's head keeps of a sample (`HeadOutput.rows`)."""


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    """What is no single number, JSON: `confusion` (rows are true classes, columns predicted ones, in the order of the
    labels); `by_type`, metrics of each type of entity or tag."""
    generated: tuple[Generated, ...] = ()
    """Seq2seq: rows with the target that the model wrote."""
    predictions: tuple[tuple[Any, Any], ...] = ()
    """For each row what is true and what was predicted: of classification the index of the label, or with several a row lists
    of 0 and 1; of a regression numbers; tags of the words; of a question the right answers and the one that was found."""

    def row_results(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """What became of each row, as JSON; nothing where a row has no answer of its own."""
        if self.generated:
            rows = [asdict(row) for row in self.generated]
            return [{key: value for key, value in row.items() if key != "task" or value} for row in rows]
        return [{"label": _named(true, labels), "predicted": _named(found, labels)} for true, found in self.predictions]


def _named(label: Any, names: Sequence[str]) -> Any:
    """The name of a label's index, or those of the labels that a row has; what is no index is told as it is."""
    if isinstance(label, list) and label and isinstance(label[0], int):
        return [name for name, on in zip(names, label, strict=True) if on]
    return names[label] if isinstance(label, int) else label


@dataclass(frozen=True)
class Totals:
    """Sums over all rows."""

    loss_sum: float
    weight: float
    correct: float
    more: Mapping[str, float] = field(default_factory=dict)
    """The other sums of the task's head, by name (`HeadOutput.sums`)."""

    @classmethod
    def of(cls, sums: Mapping[str, float]) -> Totals:
        """From sums by name (`models.heads.sums_of`)."""
        own = ("loss_sum", "weight", "correct")
        more = {name: value for name, value in sums.items() if name not in own}
        return cls(sums["loss_sum"], sums["weight"], sums["correct"], more)


def has_windows(task: TaskConfig) -> bool:
    """Whether a row may be several samples that are measured together."""
    return isinstance(task, TokenClassificationConfig | QuestionAnsweringConfig)


def count_rows(split: Split, task: TaskConfig) -> int:
    """Rows that are evaluated: of tasks with windows whole rows, else samples."""
    return len(np.unique(split.origins)) if split.origins is not None and has_windows(task) else len(split.lengths)


def measure(task: TaskConfig, labels: tuple[str, ...], split: Split, totals: Totals, kept: Sequence[Row]) -> Evaluation:
    """The metrics of `task`. kept: of each sample of `split`, in its order; empty for language models."""
    match task:
        case ChatConfig() | CausalLmConfig():
            return Evaluation(
                language_model_metrics(totals.loss_sum, totals.weight, totals.correct, int(split.column("bytes").sum()))
            )
        case Seq2SeqConfig():
            return Evaluation(language_model_metrics(totals.loss_sum, totals.weight, totals.correct))
        case ClassificationConfig():
            return _classes(task, totals, kept)
        case TokenClassificationConfig():
            names = np.array(labels)
            tags = {
                name: [
                    names[np.concatenate([window[name] for window in windows])].tolist()
                    for windows in rows_of(split, kept)
                ]
                for name in ("prediction", "label")
            }
            metrics, by_type = token_metrics(tags["prediction"], tags["label"], labels, task.scheme)
            loss = {"loss": totals.loss_sum / totals.weight}
            pairs = tuple(zip(tags["label"], tags["prediction"], strict=True))
            return Evaluation(loss | metrics | {"targets": totals.weight}, {"by_type": by_type}, predictions=pairs)
        case QuestionAnsweringConfig():
            return _answers(task, split, totals, kept)
        case PreferenceConfig():
            return Evaluation(preference_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))
        case RewardConfig():
            return Evaluation(reward_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))
        case EmbeddingConfig():
            return Evaluation(embedding_metrics(kept, task.temperature))
    raise AssertionError(f"no metrics for {task!r}")


def measure_step(task: TaskConfig, totals: Totals) -> dict[str, float]:
    """What a training step reports beside its loss."""
    match task:
        case PreferenceConfig():
            metrics = preference_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more)
        case RewardConfig():
            metrics = reward_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more)
        case _:
            return {}
    return {name: value for name, value in metrics.items() if name not in ("loss", "targets")}


def _classes(task: ClassificationConfig, totals: Totals, kept: Sequence[Row]) -> Evaluation:
    loss = {"loss": totals.loss_sum / totals.weight}
    predicted, true = ([row[name].tolist() for row in kept] for name in ("prediction", "label"))
    pairs = tuple(zip(true, predicted, strict=True))
    if task.regression:
        return Evaluation(loss | regression_metrics(predicted, true), predictions=pairs)
    probabilities = np.stack([row["probability"] for row in kept])
    if task.multi_label:
        return Evaluation(loss | multi_label_metrics(predicted, true, probabilities), predictions=pairs)
    metrics, confusion = classification_metrics(predicted, true, probabilities)
    return Evaluation(loss | metrics, {"confusion": confusion}, predictions=pairs)


def _answers(task: QuestionAnsweringConfig, split: Split, totals: Totals, kept: Sequence[Row]) -> Evaluation:
    spans, margins = best_spans(split, kept)
    right = [[answer["text"] for answer in row["answers"]] for row in texts_of(split)]
    metrics = answer_metrics(spans, right, margins if task.no_answer else None, task.threshold)
    found = spans
    if task.no_answer:
        found = ["" if margin > task.threshold else span for span, margin in zip(spans, margins, strict=True)]
    loss = {"loss": totals.loss_sum / totals.weight}
    pairs = tuple(zip(right, found, strict=True))
    return Evaluation(loss | metrics | {"targets": float(len(right))}, predictions=pairs)


def best_spans(split: Split, kept: Sequence[Row]) -> tuple[list[str], list[float]]:
    """Of each question the text of the best span of all windows, and how much better having no answer scores."""
    spans, margins = [], []
    for windows, row in zip(rows_of(split, kept), texts_of(split), strict=True):
        best = max(windows, key=lambda window: float(window["score"]))
        # A window that does not hold the answer knows of none; one that is sure of the answer speaks for all.
        margins.append(min(float(window["null"]) for window in windows) - float(best["score"]))
        found = math.isfinite(float(best["score"]))
        spans.append(row["context"][int(best["char_start"]) : int(best["char_end"])].strip() if found else "")
    return spans, margins


def texts_of(split: Split) -> Iterator[dict[str, Any]]:
    """The normalised row of each row that is measured, in order."""
    assert split.origins is not None and split.texts is not None, "its rows were kept"
    for number in np.unique(split.origins).tolist():
        yield json.loads(split.texts[number]["row"])


def rows_of(split: Split, kept: Sequence[Row]) -> Iterator[list[Row]]:
    """The samples of each row together, in order."""
    assert split.origins is not None, "only validation and test rows are measured"
    edges = np.flatnonzero(np.diff(split.origins)) + 1
    for start, end in zip([0, *edges], [*edges, len(kept)], strict=True):
        yield list(kept[start:end])
