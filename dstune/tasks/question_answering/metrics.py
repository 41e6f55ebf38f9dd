"""Metrics of answers, as the evaluation scripts of SQuAD define them (rajpurkar.github.io/SQuAD-explorer): shares, not percent.

An answer is compared after normalization: lower case, without punctuation and the articles a, an and the, white space apart.
Of several right answers the best one counts. F1 is that of the words that two answers have in common.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from dstune.config.schema import RunConfig
from dstune.data.prepared import Split
from dstune.data.swaps import Swaps
from dstune.tasks.question_answering.config import QuestionAnsweringConfig
from dstune.trainer.counterfactual import EvaluatedRows
from dstune.trainer.measure import Evaluation, Row, Totals, rows_of, texts_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalized(text: str) -> str:
    words = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", words).split())


def exact_match(predicted: str, right: str) -> float:
    return float(normalized(predicted) == normalized(right))


def word_f1(predicted: str, right: str, *, no_answer: bool) -> float:
    """Compute the F1 of the words of two answers. no_answer: two answers without words are equal, as in the script of SQuAD 2;
    in that of SQuAD 1.1 their F1 is 0."""
    predicted_words, right_words = normalized(predicted).split(), normalized(right).split()
    if no_answer and not (predicted_words and right_words):
        return float(predicted_words == right_words)
    common = sum((Counter(predicted_words) & Counter(right_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted_words), common / len(right_words)
    return 2 * precision * recall / (precision + recall)


def scores(predicted: str, right: Sequence[str], *, no_answer: bool) -> tuple[float, float]:
    """Compute exact match and F1 of one answer. right: all texts that count as right; none where there is no answer."""
    if no_answer:
        right = [text for text in right if normalized(text)] or [""]
    return (
        max(exact_match(predicted, text) for text in right),
        max(word_f1(predicted, text, no_answer=no_answer) for text in right),
    )


def answer_metrics(
    predicted: Sequence[str],
    right: Sequence[Sequence[str]],
    margins: Sequence[float] | None = None,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Compute exact match and F1 over all questions.

    margins: for questions that may have no answer (SQuAD 2), by how much the score of no answer exceeds that of the best span;
    above `threshold`, no answer is predicted. `predicted` are then the best spans, and there are also metrics of the questions with
    and without an answer, and the threshold with the highest F1 on these rows (`best_threshold`, `best_f1`).
    """
    if margins is None:
        row_scores = [scores(text, answers, no_answer=False) for text, answers in zip(predicted, right, strict=True)]
        return {"exact_match": _mean([exact for exact, _ in row_scores]), "f1": _mean([f1 for _, f1 in row_scores])}
    spans = [scores(text, answers, no_answer=True) for text, answers in zip(predicted, right, strict=True)]
    none = [(float(not answers), float(not answers)) for answers in right]
    chosen = [empty if margin > threshold else span for margin, span, empty in zip(margins, spans, none, strict=True)]
    answerable = [bool(answers) for answers in right]
    metrics = {"exact_match": _mean([exact for exact, _ in chosen]), "f1": _mean([f1 for _, f1 in chosen])}
    for name, which in (("answerable", True), ("unanswerable", False)):
        part = [row_scores for row_scores, answers in zip(chosen, answerable, strict=True) if answers is which]
        if part:
            metrics[f"exact_match_{name}"] = _mean([exact for exact, _ in part])
            metrics[f"f1_{name}"] = _mean([f1 for _, f1 in part])
    # Start with no answer to any question, then answer one question after the other with its span, the surest first.
    best = total = sum(f1 for _, f1 in none)
    best_threshold = min(margins) - 1.0
    order = sorted(range(len(margins)), key=margins.__getitem__)
    for place, number in enumerate(order):
        total += spans[number][1] - none[number][1]
        tied = place + 1 < len(order) and margins[order[place + 1]] == margins[number]
        if total > best and not tied:
            best, best_threshold = total, margins[number]
    return metrics | {"best_f1": best / len(right), "best_threshold": best_threshold}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def measure(task: QuestionAnsweringConfig, split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
    spans, margins = best_spans(split, outputs)
    right = [[answer["text"] for answer in row["answers"]] for row in texts_of(split)]
    metrics = answer_metrics(spans, right, margins if task.no_answer else None, task.threshold)
    answers = spans
    if task.no_answer:
        answers = ["" if margin > task.threshold else span for span, margin in zip(spans, margins, strict=True)]
    loss = {"loss": totals.loss_sum / totals.weight}
    pairs = tuple(zip(right, answers, strict=True))
    return Evaluation(loss | metrics | {"targets": float(len(right))}, predictions=pairs)


def best_spans(split: Split, outputs: Sequence[Row]) -> tuple[list[str], list[float]]:
    """Return each question's best span in all chunks, as text, and by how much the score of no answer exceeds its score."""
    spans, margins = [], []
    for chunks, row in zip(rows_of(split, outputs), texts_of(split), strict=True):
        best = max(chunks, key=lambda chunk: float(chunk["score"]))
        # A chunk that does not hold the answer knows of none; one that is sure of the answer speaks for all.
        margins.append(min(float(chunk["null"]) for chunk in chunks) - float(best["score"]))
        has_answer = math.isfinite(float(best["score"]))
        spans.append(row["context"][int(best["char_start"]) : int(best["char_end"])].strip() if has_answer else "")
    return spans, margins


def swapped_answers(
    task: QuestionAnsweringConfig, run: RunConfig, before: EvaluatedRows, after: EvaluatedRows
) -> tuple[list[str], list[str]]:
    """Return the answers before the swap of terms, with the terms in them swapped too, and the answers after it."""
    assert run.evaluate.counterfactual is not None
    swaps = Swaps.read(run.evaluate.counterfactual)
    earlier, later = _answers_of(task, *before), _answers_of(task, *after)
    return [normalized(swaps.text(text)) for text in earlier], [normalized(text) for text in later]


def _answers_of(task: QuestionAnsweringConfig, split: Split, outputs: Sequence[Row]) -> list[str]:
    """Return the answer to each question, empty where there is none."""
    spans, margins = best_spans(split, outputs)
    none = [task.no_answer and margin > task.threshold for margin in margins]
    return ["" if no_answer else span for no_answer, span in zip(none, spans, strict=True)]
