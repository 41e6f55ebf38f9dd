"""Metrics of tagged words: of entities by seqeval, of single words by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dstune.data.prepared import Split
from dstune.data.tags import OUTSIDE, TagScheme, marks_entities
from dstune.tasks.token_classification.config import TokenClassificationConfig
from dstune.trainer.measure import Evaluation, Row, Totals, rows_of


def token_metrics(
    predicted: Sequence[Sequence[str]],
    true: Sequence[Sequence[str]],
    labels: Sequence[str],
    scheme: TagScheme = TagScheme.auto,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Compute the share of words with the right tag and the precision, recall and F1 of entities (equal in type, first and last
    word); for tags that do not mark entities, or with `scheme=plain`, macro F1 instead. Returns these and the metrics by type.

    predicted, true: tags of each word, [sentences][words]. A predicted I- tag that continues no entity begins one, as in the script
    of CoNLL 2000.
    """
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    flat_true = [tag for tags in true for tag in tags]
    flat_predicted = [tag for tags in predicted for tag in tags]
    metrics = {"token_accuracy": float(accuracy_score(flat_true, flat_predicted))}
    if not marks_entities(labels, scheme):
        present = sorted({*flat_true, *flat_predicted})
        metrics["f1_macro"] = float(f1_score(flat_true, flat_predicted, average="macro", labels=present))
        table = precision_recall_fscore_support(flat_true, flat_predicted, labels=present, zero_division=0.0)
        return metrics, {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": float(s)}
            for name, p, r, f, s in zip(present, *table, strict=True)
        }
    report = entity_report([list(tags) for tags in true], [list(tags) for tags in predicted])
    overall = report.pop("micro avg", {"precision": 0.0, "recall": 0.0, "f1-score": 0.0})
    metrics["entity_precision"] = float(overall["precision"])
    metrics["entity_recall"] = float(overall["recall"])
    metrics["entity_f1"] = float(overall["f1-score"])
    kinds = {label[2:] for label in labels if label != OUTSIDE}
    return metrics, {
        kind: {name.removesuffix("-score"): float(value) for name, value in scores.items()}
        for kind, scores in report.items()
        if kind in kinds
    }


def entity_report(true: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """Return seqeval's report; empty if there is no true or predicted entity, for which seqeval raises."""
    from seqeval.metrics import classification_report

    if all(tag == OUTSIDE for tags in (*true, *predicted) for tag in tags):
        return {}
    return classification_report(true, predicted, output_dict=True, zero_division=0)


def measure(
    task: TokenClassificationConfig, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]
) -> Evaluation:
    names = np.array(labels)
    tags = {
        name: [names[np.concatenate([chunk[name] for chunk in chunks])].tolist() for chunks in rows_of(split, outputs)]
        for name in ("prediction", "label")
    }
    metrics, by_type = token_metrics(tags["prediction"], tags["label"], labels, task.scheme)
    loss = {"loss": totals.loss_sum / totals.weight}
    pairs = tuple(zip(tags["label"], tags["prediction"], strict=True))
    return Evaluation(loss | metrics | {"targets": totals.weight}, {"by_type": by_type}, predictions=pairs)
